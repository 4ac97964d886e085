"""Reading rows straight from uncompressed chunk files: `preadv` or a map.

Both readers take the same arguments and give the same bytes; which is faster depends on the machine, the file system
and how much of the files is in the page cache, so `FastestReader` measures it on the dataset's own reads. Each
file is checked against the size that it must have. (A file cut short in place *while* it is copied from a map kills the
process, where `preadv` raises. Writers that replace files by renaming, as Zarr's do, cannot bring that about.)
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.storage.chunk_errors import refuse_missing, torn_chunk
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import advise, map_file, open_regular
from oocattn.storage.layout import ChunkFiles, Part

Reader = Callable[[ChunkFiles, int, int, int, int, NDArray[Any]], None]
"""(files, batch, head, start, stop, out): read tokens [start, stop) of one head into out [stop - start, D]."""

READ_AHEAD = 2  # chunks that `read_preadv` asks the kernel for ahead of the one that it copies
TRIALS = 4
TRIAL_BYTES = 4 * 2**20
"""Each reader is timed on its first 4 reads of 4 MiB or more; of smaller reads the processor's caches decide."""


def read_preadv(files: ChunkFiles, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
    """Read tokens [start, stop) of one head into `out` [stop - start, D].

    `out` is C-contiguous, of the array's dtype. Raises IntegrityError for a chunk file that is missing or of another size.
    """
    content = _bytes_of(out)
    ahead = files.parts(batch, head, start, stop)
    _advise(islice(ahead, 1, 1 + READ_AHEAD))
    for part in files.parts(batch, head, start, stop):
        _advise(islice(ahead, 1))
        with _open_part(files, part) as descriptor:
            advise(descriptor, part.offset, part.end - part.begin, os.POSIX_FADV_WILLNEED)
            _read(descriptor, files, part, content)


def read_mapped(files: ChunkFiles, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
    """As `read_preadv`, through a memory map, or a read where none can be."""
    content = _bytes_of(out)
    for part in files.parts(batch, head, start, stop):
        wanted = content[part.begin : part.end]
        slack = part.offset % mmap.ALLOCATIONGRANULARITY
        first, length = part.offset - slack, wanted.nbytes + slack
        with _open_part(files, part) as descriptor:
            mapped = map_file(descriptor, length, first)
            if mapped is None:
                _read(descriptor, files, part, content)
                continue
            with mapped:
                np.copyto(wanted, np.frombuffer(mapped, np.uint8, offset=slack))


def _read(descriptor: int, files: ChunkFiles, part: Part, content: NDArray[np.uint8]) -> None:
    """Read the bytes of a part from its open file to their place in `content`."""
    wanted, offset = memoryview(content.data)[part.begin : part.end], part.offset
    while wanted:
        with name_failure("read", part.path):
            count = os.preadv(descriptor, [wanted], offset)
        if count == 0:
            raise torn_chunk(files.location, part.key, offset, part.file_bytes)
        wanted, offset = wanted[count:], offset + count


class FastestReader:
    """Reads by the faster of two readers, learned from the first large reads.

    Until then the readers take turns, and their median seconds a byte decide: at the size of the reads that are made,
    into the buffers that are used, on files as cold or warm as they are, and without reading a byte for it. The second
    reader must win by a tenth, since no truncation can kill `read_preadv`. Small reads are left to the first.
    """

    def __init__(self, usual: Reader = read_preadv, other: Reader = read_mapped) -> None:
        self._readers = (usual, other)
        self._seconds_a_byte: dict[Reader, list[float]] = {usual: [], other: []}
        self._turn = itertools.count()
        self.learned: Reader | None = None

    def read(self, files: ChunkFiles, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read tokens [start, stop) of one head into `out`, as `read_preadv` does."""
        trial = self.learned is None and out.nbytes >= TRIAL_BYTES
        reader = self._readers[next(self._turn) % 2] if trial else self.learned or self._readers[0]
        began = time.perf_counter()
        reader(files, batch, head, start, stop, out)
        if trial:
            self._seconds_a_byte[reader].append((time.perf_counter() - began) / out.nbytes)
            usual, other = self._seconds_a_byte.values()
            if min(len(usual), len(other)) >= TRIALS:
                self.learned = self._readers[statistics.median(other) < 0.9 * statistics.median(usual)]


def _bytes_of(out: NDArray[Any]) -> NDArray[np.uint8]:
    """The same memory as bytes; numpy copies bytes faster than bfloat16."""
    return out.reshape(-1).view(np.uint8)


def _advise(parts: Iterable[Part]) -> None:
    for part in parts:
        with suppress(OSError, IntegrityError), open_regular(part.path) as descriptor:  # the read says what is wrong
            advise(descriptor, part.offset, part.end - part.begin, os.POSIX_FADV_WILLNEED)


@contextmanager
def _open_part(files: ChunkFiles, part: Part) -> Iterator[int]:
    """Open the chunk file of a part, which has the size that it must have."""
    with refuse_missing(files.location, part.key), open_regular(part.path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size != part.file_bytes:
            raise torn_chunk(files.location, part.key, size, part.file_bytes)
        yield descriptor
