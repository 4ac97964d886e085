"""Files of tensors that are damaged, are no files, or have names that can be read in two ways."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.numpy import save_file

from oocattn.errors import ProblemError
from oocattn.storage.inputs.opening import open_inputs

SHAPE = (1, 2, 6, 4)
NUMBERS = np.arange(48, dtype=np.float32).reshape(SHAPE)


def read(q: Any) -> Any:
    """The numbers of q as a run reads them."""
    source = open_inputs({"q": q, "k": NUMBERS, "v": NUMBERS}).arrays["q"]
    out = np.empty(SHAPE, np.float32)
    for head in range(2):
        source.read_rows(0, head, 0, 6, out[0, head])
    return out


def refused(q: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message) as error:
        read(q)
    assert "\n" not in str(error.value)


def npy(header: str, *, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + bytes(10_000)


@pytest.mark.parametrize("shape", ["(1,2,True,4)", "(True,2,6,4)", "(1,2,-6,4)", "(1,2,10**9,4)"])
def test_a_header_of_npy_without_a_shape_is_refused(shape: str, tmp_path: Path) -> None:
    (tmp_path / "q.npy").write_bytes(npy(f"{{'descr':'<f4','fortran_order':False,'shape':{shape},}}"))
    refused(tmp_path / "q.npy", r"q: .*q\.npy cannot be mapped to an array of numbers")


def test_a_long_header_of_npy_is_refused_without_the_advice_of_numpy(tmp_path: Path) -> None:
    (tmp_path / "q.npy").write_bytes(npy(" " * 70_000, version=2))
    refused(tmp_path / "q.npy", r"\(Header info length \(70000\) is large[^.]*\): save one plain array with numpy\.save$")


@pytest.mark.parametrize("suffix", ["npy", "pt", "pth", "safetensors", "safetensors.index.json"])
def test_what_is_no_file_is_refused_by_the_name_of_the_tensor(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    os.mkfifo(tmp_path / f"fifo.{suffix}")
    refused(tmp_path / f"folder.{suffix}", r"^q: no Zarr array at .*folder\..* \(found a folder without zarr\.json")
    refused(f"{tmp_path}/folder.{suffix}:q", r"^q: .*folder\.\S* is a folder: expected a file$")
    refused(tmp_path / f"fifo.{suffix}", r"^q: .*fifo\.\S* is no regular file: expected a file$")


@pytest.mark.parametrize("name", ["q.npy", "q.pt", "q.safetensors"])
def test_an_array_of_zarr_may_be_called_like_a_file(name: str, tmp_path: Path) -> None:
    zarr.save_array(tmp_path / name, NUMBERS)
    np.testing.assert_array_equal(read(tmp_path / name), NUMBERS)


@pytest.mark.parametrize("file", ["none.safetensors", "a" * 300 + ".safetensors", "\ud800.safetensors", "d.safetensors"])
def test_an_index_of_a_file_that_cannot_be_read_is_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"q": file}}))
    expected = r"^q: .*(m\.safetensors\.index\.json says that q is in '.*beside it|d\.safetensors is a folder: expected)"
    refused(tmp_path / "m.safetensors.index.json", expected)


def test_names_of_tensors_may_end_as_those_of_files_do(tmp_path: Path) -> None:
    tensors = {name: NUMBERS + at for at, name in enumerate(("q", "x.npy", "a:b.pt:c", "a\nb"))}
    save_file(tensors, tmp_path / "t.safetensors")
    for name, numbers in tensors.items():
        np.testing.assert_array_equal(read(f"{tmp_path}/t.safetensors:{name}"), numbers)
    refused(f"{tmp_path}/none.safetensors:x.npy", r"q: there is no file .*none\.safetensors$")
    np.save(tmp_path / "t.safetensors:x.npy", -NUMBERS)  # then the longer name is meant
    np.testing.assert_array_equal(read(f"{tmp_path}/t.safetensors:x.npy"), -NUMBERS)


def test_names_of_files_may_have_any_character(tmp_path: Path) -> None:
    for name in ("a\nb.npy", "a:b.npy", "q.npy:x.npy", ".pt.npy"):
        np.save(tmp_path / name, NUMBERS)
        np.testing.assert_array_equal(read(str(tmp_path / name)), NUMBERS)


def test_a_tensor_that_is_named_in_a_file_of_one_without_a_name_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", NUMBERS)
    torch.save(torch.from_numpy(NUMBERS), tmp_path / "q.pt")
    for file in ("q.npy", "q.pt"):
        refused(f"{tmp_path}/{file}:k", rf"^q: \S*{file} has one tensor without a name, and 'k' is asked for")
