"""Imported datasets hold what the files held, to the bit; what cannot be imported is refused with nothing written."""

import errno
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import warm
import zarr
from safetensors.torch import save_file
from support import sizes_of
from tensors import AXES, check_dataset, make_tensors, save_npy, save_safetensors, save_torch, to_torch

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.problem.options import ProblemOptions
from oocattn.storage.inputs.dataset import Dataset, pose
from oocattn.storage.make import create
from oocattn.storage.make.importing import import_arrays


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("save", [save_npy, save_safetensors, save_torch])
def test_every_layout_of_every_format_becomes_bhnd(tmp_path, monkeypatch, save, layout):
    monkeypatch.setattr(create, "CHUNK_BYTES", 32 * 16)  # several chunks a head
    monkeypatch.setattr(create, "ROW_MULTIPLE", 1)
    held, filed = make_tensors(layout=layout)
    import_arrays(tmp_path / "qkv.zarr", **save(tmp_path, filed), layout=layout)
    check_dataset(tmp_path / "qkv.zarr", held)
    assert zarr.open_group(tmp_path / "qkv.zarr")["q"].chunks == (1, 1, 14, 8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("save", [save_npy, save_safetensors, save_torch])
def test_dtypes_are_kept(tmp_path, save, dtype):
    if save is save_npy and dtype is ml_dtypes.bfloat16:
        pytest.skip(".npy cannot say bfloat16")
    held, filed = make_tensors(dtype)
    import_arrays(tmp_path / "qkv.zarr", **save(tmp_path, filed))
    check_dataset(tmp_path / "qkv.zarr", held)


@pytest.mark.parametrize("found", ["float32", "float64"])
@pytest.mark.parametrize("asked", ["float16", "bfloat16", "float32"])
def test_dtypes_are_converted_when_asked(tmp_path, found, asked):
    held, filed = make_tensors(found)
    import_arrays(tmp_path / "qkv.zarr", **save_npy(tmp_path, filed), dtype=asked)
    check_dataset(tmp_path / "qkv.zarr", {n: t.astype(create.numpy_dtype(asked)) for n, t in held.items()})


def test_numpy_files_of_other_byte_and_axis_order_are_read(tmp_path):
    held, filed = make_tensors(np.float16)
    files = save_npy(tmp_path, {name: np.asfortranarray(tensor.astype(">f2")) for name, tensor in filed.items()})
    import_arrays(tmp_path / "qkv.zarr", **files)
    check_dataset(tmp_path / "qkv.zarr", held)


def replace(name, tensor):
    """A change of one file's contents."""
    return lambda folder: np.save(folder / f"{name}.npy", tensor)


def shaped(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (replace("q", shaped(4, 70, 8)), {}, r"q \(.*q.npy\) has shape \[4, 70, 8\].*layout"),
        (replace("k", shaped(2, 2, 71, 8)), {}, r"v.npy\)' has shape \[2, 2, 70, 8\]: expected \[2, 2, 71, 8\]"),
        (replace("k", shaped(2, 2, 70, 9)), {}, r"k.npy\)' has shape \[2, 2, 70, 9\]: expected \[2, 2, 70, 8\]"),
        (replace("v", shaped(2, 4, 70, 8)), {}, r"v.npy\)' has shape \[2, 4, 70, 8\]: expected \[2, 2, 70, 8\]"),
        (replace("v", shaped(2, 2, 70, 8, dtype=np.float16)), {}, r"v.npy\)' has dtype float16: expected float32"),
        (replace("q", shaped(2, 4, 70, 8, dtype=np.float64)), {}, r"q.npy\) has dtype float64.*dtype='float32'"),
        (replace("q", shaped(2, 4, 70, 8, dtype=np.int32)), {}, r"q.npy\) has dtype int32: expected one of float16"),
        (replace("k", shaped(2, 2, 70, 8, dtype=ml_dtypes.bfloat16)), {}, r"k.npy .*bfloat16.*safetensors"),
        (replace("k", shaped(2, 2, 70, 8, dtype=np.uint16)), {}, r"k.npy has dtype uint16.*bfloat16.*safetensors"),
        (replace("k", np.array([{}])), {}, r"k.npy cannot be mapped.*Python objects"),
        (lambda folder: (folder / "v.npy").write_bytes(b"not numpy"), {}, r"v.npy cannot be mapped"),
        (lambda folder: (folder / "v.npy").unlink(), {}, r"v: there is no file .*v.npy"),
        (lambda folder: None, {"layout": "dnhb"}, r"layout = 'dnhb'.*bhnd, bnhd"),
        (lambda folder: None, {"dtype": "int8"}, r"dtype = 'int8'.*float16"),
        (lambda folder: None, {"q": "q.csv"}, r"q: no Zarr array at .*q.csv \(found nothing\): expected .*FILE.npy"),
    ],
)
def test_tensors_that_pose_no_attention_problem_are_refused_by_name(tmp_path, spoil, options, message):
    files = save_npy(tmp_path, make_tensors()[1])
    spoil(tmp_path)
    with pytest.raises(ProblemError, match=message):
        import_arrays(tmp_path / "qkv.zarr", **(files | options))
    assert {file.name for file in tmp_path.iterdir()} <= {"q.npy", "k.npy", "v.npy"}


def test_queries_and_values_may_have_other_lengths_and_dimensions(tmp_path):
    held = make_tensors(heads=4, kv_heads=2)[0]
    held |= {"q": held["q"][:, :, :30], "v": held["v"][..., :5]}
    import_arrays(tmp_path / "qkv.zarr", **save_torch(tmp_path, held))
    check_dataset(tmp_path / "qkv.zarr", held)
    expected = {"batch": 2, "query_head": 4, "kv_head": 2, "head_dim": 8, "value_dim": 5, "query_token": 30, "key_token": 70}
    assert sizes_of(tmp_path / "qkv.zarr") == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("heads", [1, 4])
def test_a_key_bias_is_imported_as_float32(tmp_path, monkeypatch, dtype, heads):
    monkeypatch.setattr(create, "CHUNK_BYTES", 32 * 4)  # several chunks a head
    monkeypatch.setattr(create, "ROW_MULTIPLE", 1)
    held, filed = make_tensors(np.float16, layout="bnhd")
    bias = np.random.default_rng(0).standard_normal((2, heads, 70)).astype(dtype)
    bias[0, 0, :3] = [-np.inf, np.nan, 0]
    torch.save(to_torch(bias), tmp_path / "bias.pt")
    files = save_npy(tmp_path, filed)
    import_arrays(tmp_path / "qkv.zarr", **files, key_bias=tmp_path / "bias.pt", layout="bnhd")
    check_dataset(tmp_path / "qkv.zarr", {**held, "key_bias": bias.astype(np.float32)})
    assert sizes_of(tmp_path / "qkv.zarr").get("bias_head") == (1 if heads == 1 else None)
    opened = Dataset.open(tmp_path / "qkv.zarr")
    assert pose(opened, ProblemOptions()).bias_heads == heads
    assert opened.arrays["key_bias"].direct


@pytest.mark.parametrize("shape", [(70,), (1, 70), (4, 70), (1, 4, 70)], ids=str)
def test_a_key_bias_may_lack_batch_and_heads(tmp_path, shape):
    files = save_npy(tmp_path, make_tensors(layout="hnd")[1])
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.save(tmp_path / "bias.npy", bias)
    import_arrays(tmp_path / "qkv.zarr", **files, key_bias=tmp_path / "bias.npy", layout="hnd")
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "qkv.zarr")["key_bias"][...], bias.reshape(1, -1, 70))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (
            shaped(2, 3, 70),
            r"'key_bias \(.*bias.npy\)' is float32 \[2, 3, 70\]: expected float32 \[1 or 2, 1 or 4, 70\]",
        ),
        (shaped(3, 1, 70), r"is float32 \[3, 1, 70\]: expected float32 \[1 or 2, 1 or 4, 70\]"),
        (shaped(2, 4, 69), r"is float32 \[2, 4, 69\]: expected"),
        (
            shaped(2, 1, 4, 70),
            r"key_bias \(.*bias.npy\) has shape \[2, 1, 4, 70\]: expected \[B, H, N\]",
        ),
        (shaped(2, 1, 70, dtype=bool), r"key_bias \(.*bias.npy\) has dtype bool: expected one of float16"),
        (np.full((2, 1, 70), 1e300), r"bias.npy holds values too large for float32, head 0, tokens 0 to 70"),
    ],
    ids=["heads", "batch", "keys", "rank", "dtype", "too large"],
)
def test_a_key_bias_that_does_not_fit_is_refused(tmp_path, bias, message):
    files = save_npy(tmp_path, make_tensors()[1])
    np.save(tmp_path / "bias.npy", bias)
    with pytest.raises(ProblemError, match=message):
        import_arrays(tmp_path / "qkv.zarr", **files, key_bias=tmp_path / "bias.npy")
    assert not (tmp_path / "qkv.zarr").exists()


class Mischief:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_files_that_are_not_plain_tensors_are_refused(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1])
    torch.save(Mischief(), tmp_path / "object.pt")
    torch.save({"k": [1, 2]}, tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.pt")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-1])
    for file, message in {
        "object.pt": "not a file of plain tensors",
        "list.pt": "is a list: expected a dense tensor",
        "two.pt": "no tensor 'k'.*:TENSOR; it holds a, b",
        "two.safetensors": "no tensor 'k'.*:TENSOR; it holds a, b",
        "two.safetensors:c": "no tensor 'c'",
        "torn.safetensors": "not a whole safetensors file",
    }.items():
        with pytest.raises(ProblemError, match=message):
            import_arrays(tmp_path / "qkv.zarr", **(files | {"k": f"{tmp_path}/{file}"}))


@pytest.mark.parametrize("save", [save_npy, save_safetensors, save_torch])
def test_tensors_are_read_where_nothing_can_be_mapped(tmp_path, monkeypatch, save):
    held, filed = make_tensors(layout="bnhd")
    files = save(tmp_path, filed)

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    import_arrays(tmp_path / "qkv.zarr", **files, layout="bnhd")
    check_dataset(tmp_path / "qkv.zarr", held)


def test_safetensors_are_read_without_their_package(tmp_path, monkeypatch):
    held, filed = make_tensors()
    files = save_safetensors(tmp_path, filed)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    import_arrays(tmp_path / "qkv.zarr", **files)
    check_dataset(tmp_path / "qkv.zarr", held)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize(
    ("save", "file"), [(save_npy, "q.npy"), (save_safetensors, "qkv.safetensors"), (save_torch, "kv.pt")]
)
def test_a_file_that_cannot_be_opened_is_not_called_anything_else(tmp_path, monkeypatch, number, save, file):
    files, real = save(tmp_path, make_tensors()[1]), os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith(file):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=rf"cannot open {tmp_path}/{file}: {os.strerror(number)}") as failure:
        import_arrays(tmp_path / "qkv.zarr", **files)
    assert failure.value.errno == number


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1])
    os.truncate(files["k"], Path(files["k"]).stat().st_size - 8)
    with pytest.raises(ProblemError, match=r"k.npy cannot be mapped to an array of numbers \(it has .* bytes of .*\)"):
        import_arrays(tmp_path / "qkv.zarr", **files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 200), r"v.npy\) has 200 bytes, expected .* it was cut short"),
        (lambda path: np.save(path, np.load(path) + 1), r"v.npy\) was changed since it was opened: .* run again"),
    ],
)
def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch, change, message):
    files, real = save_npy(tmp_path, make_tensors()[1]), create.write_chunk
    changes = [lambda: change(files["v"])]

    def write(*arguments):
        real(*arguments)
        while changes:
            changes.pop()()

    monkeypatch.setattr(create, "write_chunk", write)
    with pytest.raises(IntegrityError, match=message):
        import_arrays(tmp_path / "qkv.zarr", **files)
    assert not (tmp_path / "qkv.zarr").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"q": 3}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, 2, 1], "data_offsets": [0, 4]}}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, -1, -1], "data_offsets": [0, 4]}}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [-4, 0]}}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [4, 8]}}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, 1, 0.5], "data_offsets": [0, 4]}}',
        b'{"q": {"dtype": "F32", "shape": [1.0, 1, 1, 1], "data_offsets": [0, 4]}}',
        b'{"q": {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [0.0, 4.0]}}',
        b'{"q": {"dtype": "F32", "shape": "1111", "data_offsets": "04"}}',
        b'{"q": {"shape": [1, 1, 1, 1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_safetensors_is_not_believed(tmp_path, header):
    file = tmp_path / "qkv.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ProblemError, match=r"q: .*qkv.safetensors is not a whole safetensors file"):
        import_arrays(tmp_path / "qkv.zarr", q=file, k=file, v=file)
    file.write_bytes((1 << 60).to_bytes(8, "little"))
    with pytest.raises(ProblemError, match=r"its header would have"):
        import_arrays(tmp_path / "qkv.zarr", q=file, k=file, v=file)


def test_values_that_a_conversion_would_lose_are_refused(tmp_path):
    _, filed = make_tensors()
    filed["v"][1, 1, 69, 7] = 70_000
    filed["v"][0, 0, 0, 0] = np.inf  # infinite already: nothing is lost
    files = save_npy(tmp_path, filed)
    with pytest.raises(ProblemError, match=r"v.npy holds values too large for float16, head 1"):
        import_arrays(tmp_path / "qkv.zarr", **files, dtype="float16")
    assert not (tmp_path / "qkv.zarr").exists()
    import_arrays(tmp_path / "qkv.zarr", **files, dtype="bfloat16")
    assert np.isinf(zarr.open_group(tmp_path / "qkv.zarr")["v"][0, 0, 0, 0])


def test_an_existing_dataset_is_kept_unless_overwriting_is_asked_for(tmp_path):
    held, filed = make_tensors()
    files = save_npy(tmp_path, filed)
    zarr.create_group(tmp_path / "qkv.zarr")
    with pytest.raises(ResultExistsError, match="overwrite=True"):
        import_arrays(tmp_path / "qkv.zarr", **files)
    import_arrays(tmp_path / "qkv.zarr", **files, overwrite=True)
    check_dataset(tmp_path / "qkv.zarr", held)


MEMORY_PROBE = """
import resource, sys
import oocattn.storage.make.importing as importing, torch, safetensors
from oocattn.storage.make import create
from oocattn.storage.inputs import tensor_files
create.CHUNK_BYTES = 2**20
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
peak, write = 0, create.write_chunk
def watched(*arguments):
    global peak
    peak = max(peak, anonymous())
    write(*arguments)
create.write_chunk = watched
before = anonymous()
importing.import_arrays(sys.argv[1], q=sys.argv[2], k=sys.argv[3], v=sys.argv[4], layout="bnhd", dtype="float32")
print(peak - before)
"""


@pytest.mark.parametrize("save", [save_npy, save_safetensors, save_torch])
def test_memory_is_bounded_by_chunks_not_by_the_file(tmp_path, save):
    """64 MiB of float16 in chunks of 1 MiB: half of the file is never held in anonymous memory."""
    large, small = np.zeros((1, 2**17, 4, 64), np.float16), np.zeros((1, 2**17, 1, 64), np.float16)
    files = save(tmp_path, {"q": large, "k": small, "v": small.copy()})
    grown = int(warm.printed(MEMORY_PROBE, str(tmp_path / "qkv.zarr"), *map(str, files.values())))
    assert grown < 32 * 2**20
