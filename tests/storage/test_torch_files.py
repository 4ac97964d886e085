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
