"""Reading rows straight from uncompressed chunk files into the caller's buffer, by `preadv` or by memory map.

Both readers take the same arguments and give the same bytes; which is faster depends on the machine, the file system
and how much of the files is in the page cache, so `FastestReader` measures it on the dataset's own chunks. Neither keeps
a file open or mapped beyond its call, and each file is checked against the size that it must have. (A file cut short in
place *while* it is copied from a map kills the process, where `preadv` raises. Writers that replace files by renaming,
as Zarr's do, cannot bring that about.)
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.storage.layout import ChunkFiles, Part, missing_chunk, wrong_size

Reader = Callable[[ChunkFiles, int, int, int, int, NDArray[Any]], None]
"""(files, batch, head, start, stop, out): read tokens [start, stop) of one head into out [stop - start, D]."""

READ_AHEAD = 2
"""Chunks that `read_preadv` asks the kernel for ahead of the one that it copies."""

SAMPLES = 8
SAMPLE_BYTES = 8 * 2**20
"""Samples of 8 MiB separate the two as chunks of 64 MiB do; below 4 MiB the processor's caches decide."""

SMALL_ARRAY_BYTES = SAMPLES * SAMPLE_BYTES
"""Arrays below this size are not measured: nothing is to be gained."""


def read_preadv(files: ChunkFiles, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
    """Read tokens [start, stop) of one head into `out` [stop - start, D], C-contiguous, of the array's dtype.

    While a chunk is copied the kernel reads the next two of the request. Raises IntegrityError for a chunk file that is
    missing or of another size than it must be.
    """
    content = _bytes_of(out)
    ahead = files.parts(batch, head, start, stop)
    _advise(islice(ahead, 1 + READ_AHEAD))
    for part in files.parts(batch, head, start, stop):
        _advise(islice(ahead, 1))
        with _opened(files, part) as descriptor:
            wanted = memoryview(content.data)[part.begin : part.end]
            offset = part.offset
            while wanted:
                count = os.preadv(descriptor, [wanted], offset)
                if count == 0:
                    raise wrong_size(files.location, part.key, offset, part.file_bytes)
                wanted, offset = wanted[count:], offset + count


def read_mapped(files: ChunkFiles, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
    """As `read_preadv`, by mapping each chunk file, copying from the map and unmapping it."""
    content = _bytes_of(out)
    for part in files.parts(batch, head, start, stop):
        wanted = content[part.begin : part.end]
        slack = part.offset % mmap.ALLOCATIONGRANULARITY
        first, length = part.offset - slack, wanted.nbytes + slack
        with (
            _opened(files, part) as descriptor,
            mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=first) as mapped,
        ):
            np.copyto(wanted, np.frombuffer(mapped, np.uint8, offset=slack))


def will_need(files: ChunkFiles, batch: int, head: int, start: int, stop: int) -> None:
    """Ask the kernel to read tokens [start, stop) of one head into the page cache; returns at once."""
    _advise(files.parts(batch, head, start, stop))


class FastestReader:
    """Chooses the reader for the arrays of one dataset, measuring once, when an array of 64 MiB or more is first read."""

    def __init__(self) -> None:
        self._measured: Reader | None = None

    def __call__(self, files: ChunkFiles) -> Reader:
        """The reader for this array; `read_preadv` for a small one. Raises what the readers raise."""
        if files.array.nbytes < SMALL_ARRAY_BYTES:
            return read_preadv
        if self._measured is None:
            self._measured = _measure(files)
        return self._measured


def _measure(files: ChunkFiles) -> Reader:
    """The reader that is faster on this array as it lies there now, cold or warm.

    Eight samples of 8 MiB, spread over the array, are read once each, the readers taking turns; the medians decide. The
    map must win by a tenth, since `preadv` is the one that no truncation can kill.
    """
    _, heads, tokens, head_dim = shape = (1, *files.array.shape)[-4:]
    rows = min(tokens, SAMPLE_BYTES // (head_dim * files.array.dtype.itemsize))
    buffer = np.ones((rows, head_dim), files.array.dtype)
    seconds: dict[Reader, list[float]] = {read_preadv: [], read_mapped: []}
    for sample, first in enumerate(np.linspace(0, math.prod(shape[:3]) - 1, SAMPLES, dtype=np.int64)):
        group, token = divmod(int(first), tokens)
        start = min(token, tokens - rows)
        reader = (read_preadv, read_mapped)[sample % 2]
        began = time.perf_counter()
        reader(files, *divmod(group, heads), start, start + rows, buffer)
        seconds[reader].append(time.perf_counter() - began)
    mapped, read = (statistics.median(seconds[reader]) for reader in (read_mapped, read_preadv))
    return read_mapped if mapped < 0.9 * read else read_preadv


def _bytes_of(out: NDArray[Any]) -> NDArray[np.uint8]:
    """The same memory as bytes; numpy copies bytes faster than bfloat16."""
    return out.reshape(-1).view(np.uint8)


def _advise(parts: Iterable[Part]) -> None:
    for part in parts:
        try:
            descriptor = os.open(part.path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # advice only: the read says what is missing
        try:
            os.posix_fadvise(descriptor, part.offset, part.end - part.begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


@contextmanager
def _opened(files: ChunkFiles, part: Part) -> Iterator[int]:
    """A descriptor of the part's chunk file, which exists and has the size that it must have."""
    try:
        descriptor = os.open(part.path, os.O_RDONLY)
    except FileNotFoundError:
        raise missing_chunk(files.location, part.key) from None
    try:
        size = os.fstat(descriptor).st_size
        if size != part.file_bytes:
            raise wrong_size(files.location, part.key, size, part.file_bytes)
        yield descriptor
    finally:
        os.close(descriptor)
