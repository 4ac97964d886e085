"""Imported datasets hold what the files held, to the bit; what cannot be imported is refused with nothing written."""

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from oocattn.errors import ProblemError, ResultExistsError
from oocattn.storage.make import create, tensor_files
from oocattn.storage.make.importing import import_arrays

AXES = {"bhnd": (0, 1, 2, 3), "bnhd": (0, 2, 1, 3), "hnd": (0, 1, 2), "nhd": (1, 0, 2)}  # from [B, H, N, D], to and fro


def make_tensors(dtype=np.float32, layout="bhnd", heads=4, kv_heads=2, tokens=70, head_dim=8):
    """q, k, v as the dataset should hold them [B, H, N, D], and as a file in `layout` holds them."""
    generator = np.random.default_rng(0)
    batch = 2 if "b" in layout else 1
    held = {
        name: generator.standard_normal((batch, count, tokens, head_dim)).astype(dtype)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    filed = {n: np.transpose(t if "b" in layout else t[0], AXES[layout]) for n, t in held.items()}
    return held, filed


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save_npy(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor)
    return {name: str(folder / f"{name}.npy") for name in tensors}


def save_safetensors(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """All in one file; v under another name, so that it has to be named."""
    names = {"q": "q", "k": "k", "v": "model.layers.0.value"}
    save_file({names[name]: to_torch(tensor) for name, tensor in tensors.items()}, folder / "qkv.safetensors")
    return {n: f"{folder}/qkv.safetensors" + (f":{names[n]}" if n == "v" else "") for n in tensors}


def save_torch(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """q alone in its file; k and v in a dict."""
    torch.save(to_torch(tensors["q"]), folder / "q.pt")
    torch.save({name: to_torch(tensors[name]) for name in "kv"}, folder / "kv.pt")
    return {"q": f"{folder}/q.pt", "k": f"{folder}/kv.pt", "v": f"{folder}/kv.pt:v"}


def check_dataset(path: Path, held: dict[str, np.ndarray]) -> None:
    group = zarr.open_group(path, mode="r")
    for name, tensor in held.items():
        assert group[name].dtype == tensor.dtype
        np.testing.assert_array_equal(group[name][...], tensor)


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
        (replace("q", shaped(4, 70, 8)), {}, r"q \(.*q.npy\) has shape \[4, 70, 8\].*--layout"),
        (replace("k", shaped(2, 2, 71, 8)), {}, r"'q \(|'k \(.*k.npy\)' has shape \[2, 2, 71, 8\]: expected"),
        (replace("v", shaped(2, 4, 70, 8)), {}, r"v.npy\)' has shape \[2, 4, 70, 8\]: expected \[2, 2, 70, 8\]"),
        (replace("v", shaped(2, 2, 70, 8, dtype=np.float16)), {}, r"v.npy\)' has dtype float16: expected float32"),
        (replace("q", shaped(2, 4, 70, 8, dtype=np.float64)), {}, r"q.npy\) has dtype float64.*--dtype float32"),
        (replace("q", shaped(2, 4, 70, 8, dtype=np.int32)), {}, r"q.npy\) has dtype int32: expected one of float16"),
        (replace("k", shaped(2, 2, 70, 8, dtype=ml_dtypes.bfloat16)), {}, r"k.npy .*bfloat16.*safetensors"),
        (replace("k", shaped(2, 2, 70, 8, dtype=np.uint16)), {}, r"k.npy has dtype uint16.*bfloat16.*safetensors"),
        (replace("k", np.array([{}])), {}, r"k.npy cannot be mapped.*Python objects"),
        (lambda folder: (folder / "v.npy").write_bytes(b"not numpy"), {}, r"v.npy cannot be mapped"),
        (lambda folder: (folder / "v.npy").unlink(), {}, r"v: there is no file .*v.npy"),
        (lambda folder: None, {"layout": "dnhb"}, r"layout = 'dnhb'.*bhnd, bnhd"),
        (lambda folder: None, {"dtype": "int8"}, r"dtype = 'int8'.*float16"),
        (lambda folder: None, {"q": "q.csv"}, r"q: q.csv is not understood: expected FILE.npy"),
    ],
)
def test_what_is_no_attention_problem_is_refused_by_name(tmp_path, spoil, options, message):
    files = save_npy(tmp_path, make_tensors()[1])
    spoil(tmp_path)
    with pytest.raises(ProblemError, match=message):
        import_arrays(tmp_path / "qkv.zarr", **(files | options))
    assert {file.name for file in tmp_path.iterdir()} <= {"q.npy", "k.npy", "v.npy"}


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


@pytest.mark.parametrize("step", [1, 100, 1 << 20, None])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tensors_are_views_of_others_in_files_of_torch(tmp_path, monkeypatch, step, dtype):
    """Mapped, or read in steps of any size: transposed, every other row, repeated, from the middle of a larger one."""
    if step is not None:
        monkeypatch.setattr(tensor_files, "STEP_BYTES", step)
        monkeypatch.setattr(tensor_files, "map_file", lambda *_: None)
    held, _ = make_tensors(dtype, heads=2, kv_heads=2, tokens=10)
    whole = to_torch(np.concatenate([held["q"], held["k"]], axis=1))
    views = {
        "q": whole.transpose(2, 3).contiguous().transpose(2, 3)[:, 1:3, ::2],
        "k": whole[:, 2:, 5:],
        "v": whole[:, :1, 5:].expand(-1, 2, -1, -1),
    }
    torch.save(views, tmp_path / "views.pt")
    import_arrays(tmp_path / "qkv.zarr", **dict.fromkeys("qkv", f"{tmp_path}/views.pt"))
    both = np.concatenate([held["q"], held["k"]], axis=1)
    check_dataset(
        tmp_path / "qkv.zarr",
        {"q": both[:, 1:3, ::2], "k": both[:, 2:, 5:], "v": np.repeat(both[:, :1, 5:], 2, axis=1)},
    )


def test_files_of_an_old_torch_are_named(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1])
    torch.save(torch.zeros(2, 2, 70, 8), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ProblemError, match=r"old.pt is in the format of torch before 1.6: load it and save it again"):
        import_arrays(tmp_path / "qkv.zarr", **(files | {"k": f"{tmp_path}/old.pt"}))


def write_archive(file, source, compression=zipfile.ZIP_STORED, order=b"little"):
    """The file of torch that `source` is, written again by another program."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(file, "w", compression) as after:
        for name in before.namelist():
            after.writestr(name, order if name.endswith("/byteorder") else before.read(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compression": zipfile.ZIP_DEFLATED}, "k.pt is compressed"), ({"order": b"big"}, "k.pt has numbers of another byte")],
)
def test_archives_that_torch_did_not_write_are_read_as_they_are_or_refused(tmp_path, options, message):
    held, filed = make_tensors()
    files = save_npy(tmp_path, filed) | {"k": f"{tmp_path}/k.pt"}
    torch.save(to_torch(filed["k"]), tmp_path / "whole.pt")
    write_archive(tmp_path / "k.pt", tmp_path / "whole.pt")
    import_arrays(tmp_path / "qkv.zarr", **files)
    check_dataset(tmp_path / "qkv.zarr", held)
    write_archive(tmp_path / "k.pt", tmp_path / "whole.pt", **options)
    with pytest.raises(ProblemError, match=message):
        import_arrays(tmp_path / "other.zarr", **files)


def test_a_negation_that_torch_keeps_beside_the_elements_is_refused(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    torch.save(torch._neg_view(torch.ones(2, 2, 70, 8)), tmp_path / "k.pt")
    with pytest.raises(ProblemError, match=r"k.pt is the negative of what is stored: save tensor.resolve_neg"):
        import_arrays(tmp_path / "qkv.zarr", **files)


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
        (lambda path: os.truncate(path, 200), r"v.npy ends at byte 200: it is cut short"),
        (lambda path: np.save(path, np.load(path) + 1), r"v.npy was changed while it was read: import it again"),
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
    with pytest.raises(ProblemError, match=message):
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
    with pytest.raises(ResultExistsError, match="--overwrite"):
        import_arrays(tmp_path / "qkv.zarr", **files)
    import_arrays(tmp_path / "qkv.zarr", **files, overwrite=True)
    check_dataset(tmp_path / "qkv.zarr", held)


MEMORY_PROBE = """
import resource, sys
import oocattn.storage.make.importing as importing, torch, safetensors
from oocattn.storage.make import create
from oocattn.storage.make import tensor_files
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
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "qkv.zarr"), *files.values()]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 32 * 2**20
