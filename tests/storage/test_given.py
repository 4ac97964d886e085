"""Arguments that are read from files or arrays of the dataset: the argument is named, and nothing is run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn import OocattnError, ProblemError


@pytest.fixture(autouse=True)
def _beside_a_dataset(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fast_path)
    write_dataset(fast_path / "d.zarr", normal_arrays(24))


def posed(**asked: Any) -> None:
    oocattn.attention("d.zarr", "out.zarr", **asked)


def add_array(name: str, data: Any) -> None:
    data, options = np.asarray(data), {"compressors": None, "config": {"write_empty_chunks": True}}
    zarr.open_group("d.zarr").create_array(name, shape=data.shape, dtype=data.dtype, **options)[...] = data


def header_of(shape: str, descr: str = "'<i8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npy_of(data: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, data, allow_pickle=True)
    return file.getvalue()


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "a header that is code": b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch pwned')".ljust(63) + b"\n",
    "a header that does not end": header_of("(2,)").replace(b"}", b"("),
    "a negative shape": header_of("(-4,)") + bytes(32),
    "a huge shape": header_of(f"({2**40},)") + bytes(32),
    "a shape of nothing": header_of(f"(0, {2**70})"),
    "no shape": header_of("None") + bytes(32),
    "a cut file": npy_of(np.arange(100))[:-8],
    "pickled objects": npy_of(np.array([0, 24, None], object)),
    "a record": npy_of(np.zeros(3, [("a", "<i8"), ("b", "<f4")])),
    "floats": npy_of(np.array([0.0, 24.0])),
    "text": npy_of(np.array(["0", "24"])),
    "two dimensions": npy_of(np.array([[0, 24]])),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_npy_file_is_refused_and_never_unpickled(case):
    Path("edges.npy").write_bytes(HOSTILE[case])
    with pytest.raises(ProblemError, match=r"^cu_seqlens_q(:| = )"):
        posed(cu_seqlens_q="edges.npy")
    assert sorted(os.listdir()) == ["d.zarr", "edges.npy"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["fifo", "folder", "device"]
)
def test_what_is_no_regular_file_is_refused(make):
    make("edges.npy")
    with pytest.raises(ProblemError, match=r"cu_seqlens_q: .*edges.npy is (no regular file|a folder): expected a file"):
        posed(cu_seqlens_q="edges.npy")


def test_an_npy_file_of_too_many_numbers_is_not_read():
    with open("edges.npy", "wb") as file:
        file.write(header_of(f"({2**30},)"))
        file.truncate(128 + 8 * 2**30)
    with pytest.raises(ProblemError, match=r"cu_seqlens_q: .* has shape \[1073741824\]: expected at most"):
        posed(cu_seqlens_q="edges.npy")


DAMAGED: dict[str, tuple[Callable[[], None], str]] = {
    "a chunk is missing": (lambda: (add_array("e", [0, 24]), os.remove("d.zarr/e/c/0")), "'e'.* chunk .* is missing"),
    "a chunk of a shard is missing": (
        lambda: zarr.open_group("d.zarr").create_array("e", data=np.array([0, 24]), chunks=(1,), shards=(2,)),
        "chunk 'c/0, chunk 0 of the shard' .* is missing",
    ),
    "a chunk is short": (
        lambda: (add_array("e", [0, 24]), Path("d.zarr/e/c/0").write_bytes(b"12345678")),
        "chunk .* has 8 bytes, expected 16",
    ),
    "a huge array": (
        lambda: zarr.open_group("d.zarr").create_array("e", shape=(2**40,), chunks=(100,), dtype="int64"),
        r"cu_seqlens_q = 'e': array \[1099511627776\] in chunks \[100\]: expected at most 67,108,864 numbers",
    ),
    "a huge chunk": (
        lambda: zarr.open_group("d.zarr").create_array("e", shape=(2,), chunks=(2**32,), dtype="int64"),
        "expected at most .* in chunks of at most 268,435,456 bytes",
    ),
    "a group": (lambda: zarr.open_group("d.zarr").create_group("e"), "'e' in .* is a group"),
    "packed numbers": (
        lambda: (add_array("e", [0, 24]), zarr.open_array("d.zarr/e").attrs.update(scale_factor=2.0)),
        "array 'e' .* has the attribute scale_factor = 2.0 by which its numbers are packed",
    ),
    "floats": (lambda: add_array("e", [0.0, 24.0]), "cu_seqlens_q = .*: expected whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_an_array_of_the_dataset_that_cannot_be_is_refused(case):
    damage, message = DAMAGED[case]
    damage()
    with pytest.raises(OocattnError, match=message):
        posed(cu_seqlens_q="e")
