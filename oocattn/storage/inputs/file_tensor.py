"""Tensors in files: where their numbers lie, and what all formats of files share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import open_regular
from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.parts import Part, TensorFile, make_part
from oocattn.text import printable

FILE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""The dtypes of tensors that are read, as a header of safetensors calls them and as torch does."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: elements at `offset`, `strides` bytes apart. `stamp` is of the file when it was opened.

    `key` is its name in the file, "" where the file has one tensor without a name.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    strides: tuple[int, ...]
    stamp: tuple[int, int]

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.path}:{self.key}" if self.key else str(self.path)

    def file(self, label: str) -> TensorFile:
        """The file that it lies in. Messages call the tensor `label`."""
        return TensorFile(self.path, label, self.stamp)

    def part(self, selection: Sequence[slice], file: TensorFile) -> Part:
        """The elements of a selection, a slice for each axis, of which none is empty, in its `file`."""
        spans = [range(*each.indices(size)) for each, size in zip(selection, self.shape, strict=True)]
        offset = self.offset + sum(span.start * stride for span, stride in zip(spans, self.strides, strict=True))
        return make_part(file, offset, [len(span) for span in spans], self.strides, self.dtype)

    def read(self, selection: Sequence[slice]) -> NDArray[Any]:
        """A selection of it, a slice for each axis, in native byte order.

        Raises IntegrityError where the file is not what it was when it was opened.
        """
        shape = [len(range(*each.indices(size))) for each, size in zip(selection, self.shape, strict=True)]
        out = np.empty(shape, self.dtype.newbyteorder("="))
        if out.size:
            DirectReader().read([([self.part(selection, self.file(self.label))], out)])
        return out


@contextmanager
def open_whole(name: str, path: Path) -> Iterator[int]:
    """Open the file of array `name`; yield its descriptor. Raises ProblemError where something else than a file is."""
    with name_failure("look at", path):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ProblemError(f"{name}: {path} is {found}: expected a file")
    with open_regular(path) as descriptor:
        yield descriptor


def pick(name: str, path: Path, tensor: str | None, found: list[str]) -> str:
    """The key of the tensor meant: the named one, `name`, or the only one."""
    if tensor is None and len(found) == 1:
        return found[0]
    key = tensor or name
    if key not in found:
        some = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise ProblemError(f"{name}: {path} has no tensor {key!r}: name one as {path}:TENSOR; it holds {some or 'none'}")
    return key


def only_tensor(name: str, path: Path, tensor: str) -> ProblemError:
    """The error where a tensor is named in a file that has one without a name."""
    return ProblemError(
        f"{name}: {path} has one tensor without a name, and {printable(tensor)!r:.80} is asked for: expected {path} alone"
    )


def unsupported(name: str, label: str, dtype: object) -> ProblemError:
    """The error for a dtype that no problem has."""
    expected = ", ".join(FILE_DTYPES.values())
    return ProblemError(f"{name} ({label}) has dtype {dtype}: expected one of {expected}; convert it first")


def stamp_of(descriptor: int, path: Path) -> tuple[int, int]:
    """Size and time of change of an open file."""
    with name_failure("look at", path):
        status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
