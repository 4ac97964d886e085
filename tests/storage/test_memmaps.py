"""Maps of files by NumPy: what a run reads is what the map shows, also after its file was replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oocattn.storage.inputs.opening import open_inputs

SHAPE = (1, 2, 64, 8)
OLD = np.arange(1024, dtype=np.float32).reshape(SHAPE)
NEW = OLD.copy()
NEW[0, 0, 5] = -1  # neither the first nor the last number


def read(q: Any) -> tuple[Any, str]:
    """The numbers of q as a run reads them, and the kind of source that they come from."""
    source = open_inputs({"q": q, "k": OLD, "v": OLD}).arrays["q"]
    out = np.empty(SHAPE, np.float32)
    for head in range(2):
        source.read_rows(0, head, 0, 64, out[0, head])
    return out, source.origin.kind


def replace(path: Path) -> None:
    np.save(path.with_name("new.npy"), NEW)
    os.replace(path.with_name("new.npy"), path)


def replace_alike(path: Path) -> None:
    """As `replace`, with the time of change of the old file."""
    status = path.stat()
    replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(path: Path) -> None:
    """Another file at the path, and the old one at another path."""
    path.rename(path.with_name("aside.npy"))
    np.save(path, NEW)


def link(path: Path) -> None:
    np.save(path.with_name("new.npy"), NEW)
    path.unlink()
    path.symlink_to("new.npy")


@pytest.mark.parametrize("change", [replace, replace_alike, swap, link, Path.unlink])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_map_of_a_replaced_file_is_read_from_memory(change: Callable[[Path], Any], mode: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", OLD)
    mapped = np.load(tmp_path / "q.npy", mmap_mode=mode)
    change(tmp_path / "q.npy")
    found, kind = read(mapped)
    np.testing.assert_array_equal(found, OLD)
    assert kind == "numpy"


@pytest.mark.parametrize("linked", [False, True])
def test_a_map_of_a_file_that_is_still_there_is_read_from_the_file(linked: bool, tmp_path: Path) -> None:
    np.save(tmp_path / "there.npy", OLD)
    path = tmp_path / "there.npy"
    if linked:
        path = tmp_path / "q.npy"
        path.symlink_to("there.npy")
    found, kind = read(np.load(path, mmap_mode="r"))
    np.testing.assert_array_equal(found, OLD)
    assert kind == "npy"
