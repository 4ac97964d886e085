"""The array key_bias of a dataset: opened where it is used, read and checked like the others, and else of no account."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from http_server import Handler, serving
from reference import attention_by_definition
from support import normal_arrays, write_dataset
from zarr.codecs import ZstdCodec

import oocattn
from oocattn.errors import IntegrityError, ProblemError
from oocattn.problem.options import ProblemOptions
from oocattn.storage.inputs.dataset import Dataset, check_poses, pose
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.inputs.opening import open_inputs
from oocattn.storage.make.importing import import_arrays

TOKENS, HEADS = 40, 4


def write(path: Path, bias: Any = None, batch: int = 1, **storage: Any) -> Path:
    """A dataset with the key_bias `bias`, and with none where that is None."""
    write_dataset(path, normal_arrays(TOKENS, heads=HEADS, kv_heads=2, batch=batch), chunk_rows=16)
    if bias is not None:
        options = {"chunks": (*(1 for _ in bias.shape[1:]), 16), "compressors": None, **storage}
        zarr.open_group(path).create_array("key_bias", shape=bias.shape, dtype=bias.dtype, **options)[...] = bias
    return path


def numbers(*shape: int) -> np.ndarray:
    bias = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    bias[..., 3], bias[..., 5] = -np.inf, np.nan
    return bias


def read(dataset: Dataset, batch: int, head: int, start: int, stop: int) -> np.ndarray:
    out = np.zeros(stop - start, np.float32)
    dataset.arrays["key_bias"].read_rows(batch, head, start, stop, out)
    return out


STORAGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "zstd": {"compressors": ZstdCodec()},
    "shards": {"chunks": (2, 2, 7), "shards": (2, 4, 14)},
}


@pytest.mark.parametrize("kind", STORAGE)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_key_bias_is_read_to_the_bit(tmp_path: Path, heads: int, kind: str) -> None:
    bias, storage = numbers(2, heads, TOKENS), STORAGE[kind]
    if "chunks" in storage:
        storage = {name: (2, min(heads, extents[1]), extents[2]) for name, extents in storage.items()}
    dataset = Dataset.open(write(tmp_path, bias, batch=2, **storage))
    dataset.check_complete()
    assert pose(dataset, ProblemOptions()).bias_heads == heads
    assert dataset.arrays["key_bias"].direct is (kind == "plain")
    for opened in (dataset, dataset.reopen(), pickle.loads(pickle.dumps(dataset))):
        for batch, head in np.ndindex(2, heads):
            np.testing.assert_array_equal(read(opened, batch, head, 5, 35), bias[batch, head, 5:35])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "shape", [(TOKENS,), (1, TOKENS), (HEADS, TOKENS), (1, 1, TOKENS), (1, HEADS, TOKENS), (2, 1, TOKENS)], ids=str
)
@pytest.mark.parametrize("kind", ["dataset", "array", "imported"])
def test_axes_of_a_key_bias_that_are_left_out_or_1_are_shared(
    tmp_path: Path, shape: tuple[int, ...], batch: int, kind: str
) -> None:
    """As NumPy and PyTorch broadcast it."""
    if len(shape) == 3 and shape[0] > batch:
        return
    bias = numbers(*shape)
    dataset = Dataset.open(write(tmp_path / "d", bias if kind == "dataset" else None, batch))
    if kind == "array":
        dataset = open_inputs({**{name: tmp_path / "d" / name for name in "qkv"}, "key_bias": bias})
    if kind == "imported":
        import_arrays(tmp_path / "i", **{name: tmp_path / "d" / name for name in "qkv"}, key_bias=bias)
        dataset = Dataset.open(tmp_path / "i")
        written = [array for _, array in zarr.open_group(tmp_path / "i").arrays()]
        named = {pair for array in written for pair in zip(array.metadata.dimension_names, array.shape, strict=True)}
        assert len(dict(named)) == len(named)  # one size to a name, as xarray wants it
    problem = pose(dataset, ProblemOptions())
    whole = np.broadcast_to(bias, (batch, problem.bias_heads, TOKENS))
    assert "key bias" in str(problem)
    for entry, head in np.ndindex(whole.shape[:2]):
        np.testing.assert_array_equal(read(dataset, entry, head, 5, 35), whole[entry, head, 5:35])


@pytest.mark.parametrize("batch", [2, HEADS])
def test_a_key_bias_that_all_heads_share_is_known_by_its_dimension_names(tmp_path: Path, batch: int) -> None:
    """Also where there are as many batch entries as heads, and nothing but the names tells."""
    bias = numbers(batch, TOKENS)
    path = write(tmp_path / "d", batch=batch)
    zarr.create_array(path, name="key_bias", data=bias, dimension_names=("batch", "key_token"))
    for given in (path, {name: path / name for name in ("q", "k", "v", "key_bias")}):
        dataset = open_inputs(given)
        assert pose(dataset, ProblemOptions()).bias_heads == 1
        for entry in range(batch):
            np.testing.assert_array_equal(read(dataset, entry, 0, 5, 35), bias[entry, 5:35])


def test_a_key_bias_that_batch_entries_share_is_computed_counted_and_verified_once(fast_path: Path) -> None:
    arrays, bias = normal_arrays(TOKENS, heads=HEADS, kv_heads=2, batch=2), numbers(TOKENS)
    bias[5] = 0
    given = {**dict(zip("qkv", arrays, strict=True)), "key_bias": bias}
    result = oocattn.attention(given, fast_path / "out", engine="inline")
    out, _ = attention_by_definition(*arrays, key_bias=np.broadcast_to(bias, (2, 1, TOKENS)))
    np.testing.assert_allclose(result.out[...], out, rtol=0, atol=1e-5)
    assert oocattn.verify(fast_path / "out", inputs=given).passed
    bias[7] = np.nan
    result = oocattn.attention(given, fast_path / "other", engine="inline")
    assert result.report.not_finite == 1


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (
            numbers(1, 2, TOKENS),
            r"'key_bias' is float32 \[1, 2, 40\]: expected float32 \[1, 1 or 4, 40\], a bias",
        ),
        (numbers(2, 1, TOKENS), r"'key_bias' is float32 \[2, 1, 40\]"),
        (numbers(1, 1, TOKENS - 1), r"'key_bias' is float32 \[1, 1, 39\]"),
        (numbers(1, HEADS, TOKENS, 8), r"'key_bias' is float32 \[1, 4, 40, 8\]"),
        (numbers(1, 1, TOKENS).astype(np.float16), r"'key_bias' is float16 .*key_bias=False$"),
        (np.ones((1, 1, TOKENS), np.int64), r"'key_bias' is int64"),
    ],
    ids=["heads", "batch", "keys", "four dimensions", "float16", "int64"],
)
def test_a_key_bias_that_does_not_fit_is_refused_unless_it_is_not_used(tmp_path: Path, bias: np.ndarray, words: str) -> None:
    write(tmp_path, bias)
    with pytest.raises(ProblemError, match=words):
        pose(Dataset.open(tmp_path), ProblemOptions())
    unused = Dataset.open(tmp_path, key_bias=False)
    assert pose(unused, ProblemOptions(key_bias=False)).bias_heads == 0


def test_a_key_bias_that_is_not_used_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "d")
    without = Dataset.open(tmp_path / "d").fingerprints()
    folder = tmp_path / "d" / "key_bias"
    folder.mkdir()
    (folder / "zarr.json").write_text("no JSON")
    with pytest.raises(IntegrityError, match=r"metadata of array 'key_bias' .* is damaged"):
        Dataset.open(tmp_path / "d")
    unused = Dataset.open(tmp_path / "d", key_bias=False)
    unused.check_complete()
    assert unused.fingerprints() == unused.reopen().fingerprints() == without


def test_a_key_bias_that_is_used_is_part_of_the_datasets_identity(tmp_path: Path) -> None:
    write(tmp_path, numbers(1, 1, TOKENS))
    dataset, unused = Dataset.open(tmp_path), Dataset.open(tmp_path, key_bias=False)
    before, without = dataset.fingerprint(), unused.fingerprint()
    assert before.startswith(f"{without}-")
    assert changed_arrays(without, before) == "key_bias"
    zarr.open_group(tmp_path)["key_bias"][..., 0] += 1
    assert changed_arrays(before, dataset.reopen().fingerprint()) == "key_bias"
    assert unused.reopen().fingerprint() == without


def test_a_dataset_poses_the_problem_of_a_run_with_and_without_its_bias(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path, numbers(1, 1, TOKENS)))
    problem = pose(dataset, ProblemOptions(causal=True))
    check_poses(dataset, problem, "run")
    check_poses(Dataset.open(tmp_path, key_bias=False), replace(problem, bias_heads=0), "run")
    with pytest.raises(ProblemError, match=r"poses another problem than the run's .*bias heads 1, now 0"):
        check_poses(Dataset.open(tmp_path, key_bias=False), problem, "run")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda chunk: chunk.unlink(), r"array 'key_bias' of .*: chunk 'c/0/0/1' .* is missing"),
    "short": (lambda chunk: chunk.write_bytes(b"1234"), r"array 'key_bias' .* has 4 bytes, expected 64: it is torn"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_chunk_of_the_bias_is_named(tmp_path: Path, case: str) -> None:
    spoil, words = DAMAGES[case]
    dataset = Dataset.open(write(tmp_path, numbers(1, 1, TOKENS)))
    spoil(tmp_path / "key_bias/c/0/0/1")
    with pytest.raises(IntegrityError, match=words):
        dataset.check_complete()
    with pytest.raises(IntegrityError, match=words):
        read(dataset, 0, 0, 10, 40)
    Dataset.open(tmp_path, key_bias=False).check_complete()


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ("batch head key", (0, 1, 2)),
        ("b h n", (0, 1, 2)),
        ("x y z", (0, 1, 2)),
        ("batch token head", (0, 2, 1)),
        ("head batch token", (1, 0, 2)),
    ],
)
def test_the_order_of_its_axes_is_believed(tmp_path: Path, names: str, order: tuple[int, ...]) -> None:
    write(tmp_path, numbers(1, 1, TOKENS).transpose(order), dimension_names=names.split())
    found = Dataset.open(tmp_path).key_bias
    assert found is not None
    assert found.shape == (1, 1, TOKENS)


def test_packed_numbers_are_refused(tmp_path: Path) -> None:
    write(tmp_path, numbers(1, 1, TOKENS))
    zarr.open_array(tmp_path / "key_bias").attrs["add_offset"] = 1.0
    with pytest.raises(ProblemError, match=r"array 'key_bias' .* has the attribute add_offset = 1.0"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated_metadata_must_have_the_bias_as_it_is(tmp_path: Path, zarr_format: int) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=zarr_format)
    for name, data in zip("qkv", normal_arrays(TOKENS), strict=True):
        group.create_array(name, data=data)
    group.create_array("key_bias", data=np.zeros((1, 1, TOKENS), np.float32))
    zarr.consolidate_metadata(tmp_path)
    Dataset.open(tmp_path)
    for file in [path for path in (tmp_path / "key_bias").rglob("*") if path.is_file()]:
        file.unlink()
    with pytest.raises(ProblemError, match=r"array 'key_bias' .* is missing, but in the consolidated metadata"):
        Dataset.open(tmp_path)
    Dataset.open(tmp_path, key_bias=False)


def forbid_missing(handler: Handler) -> bool:
    """Answer 403 for what is not there, as S3 does where listing is not allowed."""
    missing = not (handler.served.folder / handler.path.lstrip("/")).exists()
    if missing:
        handler.answer(403)
    return missing


@pytest.mark.parametrize("bias", [None, numbers(1, 1, TOKENS)], ids=["without", "with"])
@pytest.mark.parametrize("answer", [{}, {"pages": True}, {"fault": forbid_missing}], ids=["404", "a page", "403"])
def test_a_server_may_answer_as_it_likes_for_a_bias_that_is_missing(
    tmp_path: Path, answer: dict[str, Any], bias: Any
) -> None:
    pytest.importorskip("aiohttp")
    write(tmp_path / "d.zarr", bias)
    with serving(tmp_path, **answer) as served:
        dataset = Dataset.open(f"{served.url}/d.zarr")
        assert ("key_bias" in dataset.arrays) is (bias is not None)
