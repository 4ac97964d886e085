"""Reading numbers that lie in local files as they are: `preadv` or a map, whatever lies between them.

Both readers take the same arguments and give the same numbers; which is faster depends on the machine, the file system,
how much of the files is in the page cache, and how the numbers lie, so `FastestReader` measures it on the reads of a
run. Where rows lie apart, as those of a head in [B, N, H, D], a map touches these alone, while `preadv` copies what lies
between as well. What lies between each other, as all heads of some tokens, is read at once.

Each file is checked before and after it is read. (A file cut short in place *while* it is copied from a map kills the
process, where `preadv` raises. Writers that replace files by renaming, as Zarr's do, cannot bring that about.)
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import advise, map_file, open_regular
from oocattn.storage.inputs.parts import Part, PlainFile, Together, group_parts

Reader = Callable[[Sequence[Together]], None]
"""Reads the elements of parts into their places, in native byte order."""

READ_AHEAD = 2  # files that `read_preadv` asks the kernel for ahead of the one that it copies
TRIALS = 4
TRIAL_BYTES = 4 * 2**20
"""Each reader is timed on its first 4 reads of 4 MiB or more; of smaller reads the processor's caches decide."""

SCRATCH_BYTES = 1 << 20
"""Bytes of a file that a thread of `read_preadv` reads at a time where other bytes lie between; they stay in its cache."""

MOST_THREADS = 8
"""Threads that read at a time, those of a GPU's lane: each has its `SCRATCH_BYTES`."""

SPARSE = 2  # times their bytes that parts span from which on they are sparse


class _Scratch(threading.local):
    """Memory of a thread for what is read between elements."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """So many bytes of it, `SCRATCH_BYTES` at most."""
        if not self.memory.nbytes:
            self.memory = np.empty(SCRATCH_BYTES, np.uint8)
        return self.memory[:nbytes]


_scratch = _Scratch()


def read_preadv(wanted: Sequence[Together]) -> None:
    """Read parts of files: bytes that lie together straight into their place, others by way of a small buffer.

    Raises IntegrityError for a file that is missing or not what it was.
    """
    _advise(wanted[1 : 1 + READ_AHEAD])
    for number, together in enumerate(wanted):
        _advise(wanted[number + READ_AHEAD : number + READ_AHEAD + 1])
        with _open(together) as descriptor:
            _advise_open(descriptor, together)
            _read(descriptor, together)


def read_mapped(wanted: Sequence[Together]) -> None:
    """As `read_preadv`, through a memory map, or a read where none can be."""
    for together in wanted:
        begin, length = _span(together)
        slack = begin % mmap.ALLOCATIONGRANULARITY
        with _open(together) as descriptor:
            if length > sum(place.nbytes for _, place in together):
                _advise_open(descriptor, together)
            mapped = map_file(descriptor, length + slack, begin - slack)
            if mapped is None:
                _read(descriptor, together)
                continue
            with mapped:
                for piece in [together] if len(together) == 1 else _pieces(together):
                    _copy(piece, mapped, begin - slack)


def _read(descriptor: int, together: Together) -> None:
    """Read parts of an open file."""
    if _is_plain(together):
        part, place = together[0]
        _read_bytes(descriptor, part.file, part.offset, place.reshape(-1).view(np.uint8))
        if not part.dtype.isnative:
            place.byteswap(inplace=True)
        return
    for piece in _pieces(together):
        if _is_plain(piece):
            _read(descriptor, piece)
            continue
        begin, length = _span(piece)
        content = _scratch.take(length)
        _read_bytes(descriptor, piece[0][0].file, begin, content)
        _copy(piece, content, begin)


def _pieces(together: Together) -> Iterator[Together]:
    """Cut parts along their slowest axis until what they span is small, or can be read straight into its place."""
    part = together[0][0]
    if _is_plain(together) or _span(together)[1] <= SCRATCH_BYTES:
        yield together
    elif len(together) > 1 and not part.scattered:
        for each in together:
            yield from _pieces([each])
    else:
        axis = max(range(len(part.shape)), key=lambda axis: (part.shape[axis] > 1) * part.strides[axis])
        half = part.shape[axis] // 2
        for low, high in ((0, half), (half, part.shape[axis])):
            within = (*(slice(None) for _ in range(axis)), slice(low, high))
            yield from _pieces([(each.within(axis, low, high), place[within]) for each, place in together])


def _is_plain(together: Together) -> bool:
    """Whether bytes can be read straight into their place."""
    part, place = together[0]
    return len(together) == 1 and not part.scattered and place.flags.c_contiguous


def _span(together: Together) -> tuple[int, int]:
    """The first byte of parts in their file, and how many there are from it to the end of the last."""
    offsets = [part.offset for part, _ in together]
    return min(offsets), max(offsets) - min(offsets) + together[0][0].length


def _read_bytes(descriptor: int, file: PlainFile, offset: int, content: NDArray[np.uint8]) -> None:
    """Read bytes of an open file from `offset` on."""
    wanted = memoryview(content.data)
    while wanted:
        with name_failure("read", file.path):
            count = os.preadv(descriptor, [wanted], offset)
        if count == 0:
            raise file.short(offset)
        wanted, offset = wanted[count:], offset + count


def _copy(together: Together, content: Any, begin: int) -> None:
    """Copy the elements of parts from bytes of their file, of which the first is byte `begin`."""
    for part, place in together:
        np.copyto(place, np.ndarray(part.shape, part.dtype, content, part.offset - begin, part.strides))


class FastestReader:
    """Reads by the faster of two readers, learned from the first large reads.

    Until then the readers take turns, and their median seconds a byte decide: at the size of the reads that are made,
    into the buffers that are used, on files as cold or warm as they are, and without reading a byte for it. The second
    reader must win by a tenth. Small reads are left to the first.
    """

    def __init__(self, usual: Reader = read_preadv, other: Reader = read_mapped) -> None:
        self._readers = (usual, other)
        self._seconds_a_byte: dict[Reader, list[float]] = {usual: [], other: []}
        self._turn = itertools.count()
        self.learned: Reader | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # another machine learns for itself
        return FastestReader, self._readers

    @property
    def chosen(self) -> Reader:
        """The reader of small reads, and of all once it is learned."""
        return self.learned or self._readers[0]

    def read(self, wanted: Sequence[Together]) -> None:
        """Read parts of files, as `read_preadv` does."""
        nbytes = sum(place.nbytes for together in wanted for _, place in together) if self.learned is None else 0
        trial = nbytes >= TRIAL_BYTES
        reader = self._readers[next(self._turn) % 2] if trial else self.chosen
        began = time.perf_counter()
        reader(wanted)
        if trial:
            self._seconds_a_byte[reader].append((time.perf_counter() - began) / nbytes)
            usual, other = self._seconds_a_byte.values()
            if min(len(usual), len(other)) >= TRIALS:
                self.learned = self._readers[statistics.median(other) < 0.9 * statistics.median(usual)]


@dataclass(frozen=True)
class DirectReader:
    """The readers of numbers in files, by whether most bytes that they span are wanted. Tensors may share them.

    `preadv` is the usual one of dense ones, since no truncation can kill it. Of sparse ones it reads many times their bytes.
    """

    dense: FastestReader = field(default_factory=FastestReader)
    sparse: FastestReader = field(default_factory=lambda: FastestReader(read_mapped, read_preadv))

    def read(self, requests: Sequence[tuple[Sequence[Part], NDArray[Any]]]) -> None:
        """Read parts of files into a buffer each, C-contiguous, as `read_preadv` does: of one file, alike ones together."""
        wanted = group_parts(requests)
        span, used = _span(wanted[0])[1], sum(place.nbytes for _, place in wanted[0])
        (self.sparse if span > SPARSE * used else self.dense).read(wanted)

    def name(self, spread: int) -> str:
        """How parts are read that span `spread` times their bytes, as far as that is learned: "preadv" or "map"."""
        return "map" if (self.sparse if spread > SPARSE else self.dense).chosen is read_mapped else "preadv"


def _advise(wanted: Iterable[Together]) -> None:
    for together in wanted:
        with suppress(OSError, IntegrityError), open_regular(together[0][0].file.path) as descriptor:  # the read says so
            _advise_open(descriptor, together)


def _advise_open(descriptor: int, together: Together) -> None:
    """Ask the system for the bytes that parts span."""
    advise(descriptor, *_span(together), os.POSIX_FADV_WILLNEED)


@contextmanager
def _open(together: Together) -> Iterator[int]:
    """Open the file of parts, which is what it must be before and after it is read."""
    file = together[0][0].file
    try:
        with open_regular(file.path) as descriptor:
            file.check(os.fstat(descriptor))
            yield descriptor
            file.check(os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        raise file.missing() from None
