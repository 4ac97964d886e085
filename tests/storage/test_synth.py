"""Arrays of our own kind, and synthetic datasets: on disk is what the seed says, whole or not at all."""

import errno
import hashlib
import os

import fsspec
import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sizes_of

from oocattn.errors import ProblemError, ResultExistsError
from oocattn.storage.files import renaming
from oocattn.storage.make import create
from oocattn.storage.make.create import create_array, create_dataset, default_chunk_rows, write_chunk
from oocattn.storage.make.synth import synthesise, synthetic_rows

MIB = 2**20


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_row_of_a_dataset_comes_again_from_the_seed(tmp_path, dtype):
    synthesise(tmp_path / "qkv.zarr", tokens=5000, heads=4, kv_heads=2, head_dim=8, batch=2, dtype=dtype, seed=7, mean=1.5)
    group = zarr.open_group(tmp_path / "qkv.zarr", mode="r")
    assert group.attrs["oocattn"] == {"generator": "philox-normal-1", "seed": 7, "v_mean": 1.5}
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        assert group[name].shape == (2, heads, 5000, 8)
        for batch in range(2):
            for head in range(heads):
                rows = synthetic_rows(7, name, batch, head, 0, 5000, 8, dtype, mean=1.5 if name == "v" else 0.0)
                np.testing.assert_array_equal(group[name][batch, head], rows)


def test_keys_and_values_may_have_another_length_and_dimension(tmp_path):
    synthesise(tmp_path / "qkv.zarr", tokens=50, keys=70, heads=4, kv_heads=2, head_dim=8, value_dim=5, dtype="float32")
    group = zarr.open_group(tmp_path / "qkv.zarr", mode="r")
    assert {name: group[name].shape for name in "qkv"} == {"q": (1, 4, 50, 8), "k": (1, 2, 70, 8), "v": (1, 2, 70, 5)}
    np.testing.assert_array_equal(group["v"][0, 1], synthetic_rows(0, "v", 0, 1, 0, 70, 5, "float32"))
    names = {"batch": 1, "query_head": 4, "kv_head": 2, "query_token": 50, "key_token": 70, "head_dim": 8, "value_dim": 5}
    assert sizes_of(tmp_path / "qkv.zarr") == names


def test_a_dataset_of_one_length_is_that_of_earlier_versions(tmp_path):
    options = {"tokens": 64, "heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": "float16", "seed": 3, "mean": 0.5}
    contents = []
    for name, lengths in (("qkv.zarr", {}), ("same.zarr", {"keys": 64, "value_dim": 8})):
        synthesise(tmp_path / name, **options, **lengths)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    chunks = b"".join(content for path, content in contents[0].items() if not path.endswith("zarr.json"))
    assert hashlib.sha256(chunks).hexdigest() == "8d31a4b00380d0ca7fe4f064a7691ae381e9e526691e76f75c5275b32934c217"
    assert sizes_of(tmp_path / "qkv.zarr") == {"batch": 1, "query_head": 2, "kv_head": 1, "token": 64, "head_dim": 8}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 9000), st.integers(0, 2**64 - 1))
def test_rows_depend_on_no_chunk(start, count, seed):
    whole = synthetic_rows(seed, "k", 0, 1, 0, 29_000, 2, "float32")
    part = synthetic_rows(seed, "k", 0, 1, start, start + count, 2, "float32")
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_rows_are_independent_unit_normals_around_the_mean():
    streams = [
        synthetic_rows(seed, name, batch, head, 4096 * block, 4096 * (block + 1), 16, "float32").ravel()
        for seed in (0, 1) for name in "qkv" for batch in (0, 1) for head in (0, 1) for block in (0, 1)
    ]  # fmt: skip
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 6 / np.sqrt(streams[0].size)
    values = np.concatenate(streams)
    assert abs(values.mean()) < 5e-3
    assert values.std() == pytest.approx(1, abs=5e-3)
    assert synthetic_rows(0, "v", 0, 0, 0, 4096, 16, "float32", mean=3.0).mean() == pytest.approx(3, abs=0.03)


def test_numbers_are_those_of_this_version_of_the_generator():
    rows = synthetic_rows(2024, "v", 1, 3, 4000, 4200, 16, "float32")
    assert hashlib.sha256(rows.tobytes()).hexdigest() == "439e9a5aeae2f9f0d7f6320c70670ce3446586d490c346b4ac96ce4efff8c20b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "at least 1"),
        ({"kv_heads": 3}, "multiple of the KV heads"),
        ({"dtype": "float64"}, "float64"),
        ({"head_dim": 1025}, "head_dim = 1025"),
        ({"value_dim": 1025}, "value_dim = 1025"),
        ({"keys": 0}, "keys = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_a_wrong_problem_is_refused_before_anything_is_written(tmp_path, change, message):
    right = {"tokens": 10, "heads": 4, "head_dim": 8, "dtype": "float16"}
    with pytest.raises(ProblemError, match=message):
        synthesise(tmp_path / "qkv.zarr", **(right | change))
    assert not list(tmp_path.iterdir())


def test_an_existing_path_is_kept_unless_overwriting_is_asked_for(tmp_path):
    path = tmp_path / "qkv.zarr"
    synthesise(path, tokens=10, heads=1, head_dim=8, dtype="float16")
    with pytest.raises(ResultExistsError, match="overwrite=True"):
        synthesise(path, tokens=20, heads=1, head_dim=8, dtype="float16")
    assert zarr.open_group(path)["q"].shape[2] == 10
    synthesise(path, tokens=20, heads=1, head_dim=8, dtype="float16", overwrite=True)
    assert zarr.open_group(path)["q"].shape[2] == 20
    assert list(tmp_path.iterdir()) == [path]


def test_only_zarr_is_ever_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ResultExistsError, match="not a Zarr group"):
        synthesise(tmp_path, tokens=10, heads=1, head_dim=8, dtype="float16", overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def fail_half_way(overwrite):
        with create_dataset(tmp_path / "qkv.zarr", attributes={}, overwrite=overwrite) as group:
            write_chunk(create_array(group, "q", (1, 1, 4, 2), "float32"), (0, 0, 0, 0), np.ones((1, 1, 4, 2), "f4"))
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail_half_way(overwrite=False)
    assert not list(tmp_path.iterdir())
    zarr.create_group(tmp_path / "qkv.zarr", attributes={"mine": 1})
    with pytest.raises(OSError, match="no space"):
        fail_half_way(overwrite=True)
    assert zarr.open_group(tmp_path / "qkv.zarr").attrs["mine"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("refused", [1, 100])
def test_an_overwritten_dataset_is_given_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch, caplog, refused):
    synthesise(tmp_path / "qkv.zarr", tokens=10, heads=1, head_dim=8, dtype="float16")
    renames = []

    def rename(source, target):
        renames.append(target)
        if 1 < len(renames) <= 1 + refused:
            raise OSError(errno.EIO, f"cannot rename {source} to {target}")
        renaming.rename_new(source, target)

    monkeypatch.setattr(create, "rename_new", rename)
    with pytest.raises(OSError, match="cannot rename"):
        synthesise(tmp_path / "qkv.zarr", tokens=20, heads=1, head_dim=8, dtype="float16", overwrite=True)
    (left,) = tmp_path.iterdir()
    assert zarr.open_group(left)["q"].shape == (1, 1, 10, 8)
    assert left.name == "qkv.zarr" if refused == 1 else f"the group that was there is now at {left}" in caplog.text


def test_a_dataset_behind_a_url_is_written_too():
    synthesise("memory://synth-test", tokens=100, heads=2, head_dim=4, dtype="float32", overwrite=True)
    stored = zarr.open_group("memory://synth-test", mode="r")["v"][0, 1]
    np.testing.assert_array_equal(stored, synthetic_rows(0, "v", 0, 1, 0, 100, 4, "float32"))
    with pytest.raises(ResultExistsError):
        synthesise("memory://synth-test", tokens=100, heads=2, head_dim=4, dtype="float32")
    with fsspec.open("memory://synth-test/q/notes.txt", "wb") as notes:
        notes.write(b"precious")
    with pytest.raises(ResultExistsError, match=r"q/notes\.txt lies in memory://synth-test.*move it away"):
        synthesise("memory://synth-test", tokens=50, heads=2, head_dim=4, dtype="float32", overwrite=True)
    assert zarr.open_group("memory://synth-test", mode="r")["v"].shape == (1, 2, 100, 4)
    fsspec.filesystem("memory").rm("/synth-test/q/notes.txt")
    synthesise("memory://synth-test", tokens=50, heads=2, head_dim=4, dtype="float32", overwrite=True)
    assert zarr.open_group("memory://synth-test", mode="r")["v"].shape == (1, 2, 50, 4)


@settings(max_examples=200)
@given(st.integers(1, 2**28), st.sampled_from([1, 8, 40, 64, 80, 128, 256]), st.sampled_from([2, 4]))
def test_chunks_are_8_to_64_mib_and_level(tokens, head_dim, itemsize):
    rows = default_chunk_rows(tokens, head_dim, itemsize)
    size = rows * head_dim * itemsize
    assert size <= 64 * MIB
    assert rows == tokens or size >= 8 * MIB
    assert -tokens % rows <= 4096 * -(-tokens // rows)  # padding: less than one multiple of rows a chunk


def test_a_chunk_file_is_its_rows_padded_to_a_full_chunk(tmp_path):
    group = zarr.create_group(tmp_path)
    array = create_array(group, "out", (1, 2, 10, 4), "bfloat16", chunk_rows=8)
    data = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4).astype(ml_dtypes.bfloat16)
    write_chunk(array, (0, 1, 1, 0), data)
    folder = tmp_path / "out"
    assert sorted(file.name for file in folder.iterdir()) == ["c.0.1.1.0", "zarr.json"]
    assert (folder / "c.0.1.1.0").read_bytes() == data.tobytes() + bytes(6 * 4 * 2)
    np.testing.assert_array_equal(zarr.open_group(tmp_path)["out"][0, 1, 8:], data[0, 0])
    assert not zarr.open_group(tmp_path)["out"][0, 0].any()


def test_a_log_sum_exp_has_chunks_of_three_dimensions(tmp_path):
    array = create_array(zarr.create_group(tmp_path), "lse", (2, 3, 100), "float32", chunk_rows=60)
    values = np.random.default_rng(0).standard_normal((2, 3, 100), np.float32)
    for batch, head, part in np.ndindex(2, 3, 2):
        rows = slice(part * 60, part * 60 + 60)
        write_chunk(array, (batch, head, part), values[batch : batch + 1, head : head + 1, rows])
    np.testing.assert_array_equal(zarr.open_group(tmp_path)["lse"][...], values)


def test_other_kinds_of_array_are_written_through_zarr(tmp_path):
    array = zarr.create_group(tmp_path).create_array("a", shape=(1, 2, 10, 4), chunks=(1, 2, 8, 4), dtype="float32")
    data = np.random.default_rng(0).standard_normal((1, 2, 2, 4), np.float32)
    write_chunk(array, (0, 0, 1, 0), data)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a")[:, :, 8:], data)


@pytest.mark.parametrize("data", [np.zeros((1, 1, 8, 4), "f4"), np.zeros((1, 1, 2, 4), "f8")])
def test_a_chunk_of_another_shape_or_dtype_is_refused(tmp_path, data):
    array = create_array(zarr.create_group(tmp_path), "out", (1, 2, 10, 4), "float32", chunk_rows=8)
    with pytest.raises(ValueError, match="takes \\[1, 1, 2, 4\\] float32"):
        write_chunk(array, (0, 1, 1, 0), data)


def test_a_chunk_is_on_disk_before_it_has_its_name_and_its_name_before_the_writer_returns(tmp_path, monkeypatch):
    array = create_array(zarr.create_group(tmp_path), "out", (1, 1, 8, 4), "float32")
    chunk = tmp_path / "out" / "c.0.0.0.0"
    synced = []

    def fsync(descriptor, real=os.fsync):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), chunk.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_chunk(array, (0, 0, 0, 0), np.ones((1, 1, 8, 4), "f4"))
    (file, named), *folders = synced
    assert file.endswith(".partial")
    assert not named
    assert folders == [(str(tmp_path / "out"), True)]


def test_a_failed_write_keeps_the_old_chunk_and_leaves_no_litter(tmp_path, monkeypatch):
    array = create_array(zarr.create_group(tmp_path), "out", (1, 1, 8, 4), "float32")
    write_chunk(array, (0, 0, 0, 0), np.ones((1, 1, 8, 4), "f4"))

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(create.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_chunk(array, (0, 0, 0, 0), np.zeros((1, 1, 8, 4), "f4"))
    assert (array[...] == 1).all()
    assert not list(tmp_path.rglob("*.partial"))
