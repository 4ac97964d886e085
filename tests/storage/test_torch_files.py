"""Files of torch.save: their elements are found without being loaded, or the file is refused."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from tensors import check_dataset, make_tensors, save_npy, to_torch

from oocattn.errors import ProblemError
from oocattn.storage.inputs import direct
from oocattn.storage.make.importing import import_arrays


@pytest.mark.parametrize("step", [8, 100, 1 << 18, None])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tensors_are_views_of_others_in_files_of_torch(tmp_path, monkeypatch, step, dtype):
    """Mapped, or read in steps of any size: transposed, every other row, repeated, from the middle of a larger one."""
    if step is not None:
        monkeypatch.setattr(direct, "SCRATCH_BYTES", step)
        monkeypatch.setattr(direct, "map_file", lambda *_: None)
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


def save_view(path, monkeypatch, offset=0, size=(1, 2, 70, 8), strides=(1120, 560, 8, 1)):
    """Save a tensor whose file says that it lies otherwise in its storage."""
    reduce = torch.Tensor.__reduce_ex__

    def reduce_otherwise(self, protocol):
        function, given, *_ = reduce(self, protocol)
        return function, (given[0], offset, size, strides, *given[4:])

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__reduce_ex__", reduce_otherwise)
        torch.save(torch.zeros(1, 2, 70, 8), path)


@pytest.mark.parametrize(
    "view",
    [
        {"offset": 1},
        {"offset": -1},
        {"size": (1, 2, 71, 8)},
        {"strides": (1120, 561, 8, 1)},
        {"offset": 1200, "size": (1, 1, 1, 1)},
    ],
)
def test_a_tensor_that_lies_outside_of_its_storage_is_refused(tmp_path, monkeypatch, view):
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    save_view(tmp_path / "k.pt", monkeypatch, **view)
    with pytest.raises(ProblemError, match=r"^k: .*k\.pt (has 4,480 bytes of numbers|is not a file of plain)"):
        import_arrays(tmp_path / "qkv.zarr", **files)


def test_a_record_that_is_shorter_than_its_storage_is_refused(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    torch.save({"k": torch.zeros(1, 2, 70, 8), "other": torch.ones(9999)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as before, zipfile.ZipFile(tmp_path / "k.pt", "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, content[:-4] if len(content) == 4480 else content)
    with pytest.raises(ProblemError, match=r"^k: .*k\.pt:k has 4,476 bytes of numbers in the file, expected 4,480"):
        import_arrays(tmp_path / "qkv.zarr", **files)


def test_a_tensor_that_lies_backwards_is_refused(tmp_path, monkeypatch):
    """torch.load refuses it, but without its data makes a tensor without gaps of it."""
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    save_view(tmp_path / "k.pt", monkeypatch, strides=(1120, 560, -8, 1))
    with pytest.raises(ProblemError, match=r"^k: .*k\.pt has a tensor with a negative stride: it is damaged"):
        import_arrays(tmp_path / "qkv.zarr", **files)


@pytest.mark.parametrize("archive", [True, False])
def test_files_of_torch_that_are_cut_short_are_refused_at_any_length(tmp_path, archive):
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    torch.save(torch.zeros(2, 2, 70, 8), tmp_path / "whole.pt", _use_new_zipfile_serialization=archive)
    content = (tmp_path / "whole.pt").read_bytes()
    for length in [*range(0, 1200, 61), *range(1200, len(content), 997), len(content) - 1]:
        (tmp_path / "k.pt").write_bytes(content[:length])
        with pytest.raises(ProblemError, match=r"^k: .*k\.pt is (not a |in the format of torch before 1\.6)"):
            import_arrays(tmp_path / "qkv.zarr", **files)


def test_a_tensor_of_the_device_meta_is_refused(tmp_path):
    files = save_npy(tmp_path, make_tensors()[1]) | {"k": f"{tmp_path}/k.pt"}
    torch.save(torch.zeros(2, 2, 70, 8, device="meta"), tmp_path / "k.pt")
    with pytest.raises(ProblemError, match=r"k\.pt was saved from the device meta and has no numbers"):
        import_arrays(tmp_path / "qkv.zarr", **files)
