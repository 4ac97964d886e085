"""Plain numbers in files: which bytes of which file a read wants, and whether the file is still the one that was opened."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.storage.chunk_errors import missing_chunk, torn_chunk


class PlainFile(Protocol):
    """A file that holds numbers as they are."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def check(self, status: os.stat_result) -> None:
        """Raise IntegrityError where an open file's status is not what it must be."""

    def missing(self) -> IntegrityError:
        """The error where there is no file."""

    def short(self, size: int) -> IntegrityError:
        """The error where it ends after `size` bytes."""


@dataclass(frozen=True)
class ChunkFile:
    """A chunk of a Zarr array, `key` in the store that messages call `location`. It must have `nbytes`."""

    path: Path
    location: str
    key: str
    nbytes: int

    def check(self, status: os.stat_result) -> None:
        """See `PlainFile.check`."""
        if status.st_size != self.nbytes:
            raise self.short(status.st_size)

    def missing(self) -> IntegrityError:
        """See `PlainFile.missing`."""
        return missing_chunk(self.location, self.key)

    def short(self, size: int) -> IntegrityError:
        """See `PlainFile.short`."""
        return torn_chunk(self.location, self.key, size, self.nbytes)


@dataclass(frozen=True)
class TensorFile:
    """A file with a tensor that messages call `label`. `stamp` is its size and time of change when it was opened."""

    path: Path
    label: str
    stamp: tuple[int, int]

    def check(self, status: os.stat_result) -> None:
        """See `PlainFile.check`."""
        if (status.st_size, status.st_mtime_ns) == self.stamp:
            return
        if status.st_size < self.stamp[0]:
            raise self.short(status.st_size)
        raise IntegrityError(
            f"{self.label} was changed since it was opened: expected it to stay as it is while it is read; run again"
        )

    def missing(self) -> IntegrityError:
        """See `PlainFile.missing`."""
        return IntegrityError(f"{self.label} is missing, but was there when it was opened: put it back, and run again")

    def short(self, size: int) -> IntegrityError:
        """See `PlainFile.short`."""
        return IntegrityError(
            f"{self.label} has {size:,} bytes, expected {self.stamp[0]:,} as when it was opened: it was cut short; copy it "
            "again"
        )


@dataclass(frozen=True)
class Part:
    """Elements of a request in one file: the first at `offset`, neighbours along each axis `strides` bytes apart.

    They are of `dtype`, in the stored byte order, and fill the request's buffer from item `begin` on, in C order.
    """

    file: PlainFile
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    begin: int = 0

    @property
    def scattered(self) -> bool:
        """Whether other bytes lie between its own, or they are in another order."""
        expected = self.dtype.itemsize
        if self.strides == (expected,):
            return False
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return True
            expected *= size
        return False

    @property
    def reach(self) -> int:
        """Bytes from its first one on in which other parts begin that lie between its elements; 0 where it has no gaps."""
        return max(self.strides) if self.scattered else 0

    @property
    def length(self) -> int:
        """Bytes from its first to the end of its last element."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return last + self.dtype.itemsize

    @property
    def spread(self) -> int:
        """How many times its elements' bytes it spans."""
        return max(1, round(self.length / (math.prod(self.shape) * self.dtype.itemsize)))

    def within(self, axis: int, low: int, high: int) -> Part:
        """Elements [low, high) along an axis. `begin` has no meaning then."""
        shape = (*self.shape[:axis], high - low, *self.shape[axis + 1 :])
        return Part(self.file, self.offset + low * self.strides[axis], shape, self.strides, self.dtype)


def make_part(
    file: PlainFile, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype[Any], begin: int = 0
) -> Part:
    """A part with as few axes as its elements need, one at least. Integers stand for numbers of their size."""
    if dtype.itemsize in (1, 2, 4, 8):  # bfloat16 among them: integers are copied faster
        dtype = np.dtype(f"{dtype.str[0].replace('|', '=')}u{dtype.itemsize}")
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride == (sizes[-1] * steps[-1] if sizes else dtype.itemsize):
            sizes, steps = ([*sizes[:-1], sizes[-1] * size], steps) if sizes else ([size], [stride])
        else:
            sizes.append(size)
            steps.append(stride)
    return Part(file, offset, tuple(reversed(sizes)), tuple(reversed(steps)), dtype, begin)


Together = Sequence[tuple[Part, NDArray[Any]]]
"""Parts that are alike but for their offsets in one file, each with its place in a buffer, of its shape and C-contiguous."""


def group_parts(requests: Sequence[tuple[Sequence[Part], NDArray[Any]]]) -> Sequence[Together]:
    """Parts with their places in the buffers; those that lie between each other's elements together."""
    found: list[list[tuple[Part, NDArray[Any]]]] = []
    last: dict[Hashable, list[tuple[Part, NDArray[Any]]]] = {}
    for parts, out in requests:
        flat = out.reshape(-1).view(parts[0].dtype.newbyteorder("="))
        for part in parts:
            placed = part, flat[part.begin : part.begin + math.prod(part.shape)].reshape(part.shape)
            if len(requests) == 1 or not part.reach:  # nothing lies between
                found.append([placed])
                continue
            alike = str(part.file.path), part.begin, part.shape, part.strides
            together = last.get(alike)
            if together is None or abs(part.offset - together[0][0].offset) >= part.reach:
                together = last[alike] = []
                found.append(together)
            together.append(placed)
    return found
