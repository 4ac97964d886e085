"""Rows of a result, read from their files or through Zarr within a bound of memory, and compared by checksum."""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.records import Count
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.codecs import DECODE_COPIES, DECODE_OVERHEAD, INDEX_COPIES, complete_array, read_span
from oocattn.storage.inputs.decoding import array_chain
from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.zarr_source import MOST_FILES
from oocattn.storage.layout import ChunkFiles, obstacles, stored_bytes
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.results.checksums import Checksums, as_digits
from oocattn.threads import ThreadPool, map_in_order
from oocattn.units import ceil_div


class RowReader:
    """Reads rows of one head of the array `name` [B, H, N, ...]. Reads may run in several threads at once.

    Files that hold plain numbers are read directly, others through Zarr. `mapped` says whether a read takes no memory
    besides its buffer.
    """

    def __init__(self, name: str, array: zarr.Array[Any], location: str) -> None:
        self.name = name
        self.shape = array.shape
        self.dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
        self._files: ChunkFiles | None = None
        self._reading = DirectReader()
        self.mapped = False
        store, axes = array.store, Axes("bhnd"[: array.ndim])
        if isinstance(store, MappedStore):
            if not obstacles(array, axes):
                self._files = ChunkFiles(array, store.root, location, axes)
            self.mapped = self._files is not None or (stored_bytes(array) is not None and store.can_map(array.path))
        self._array = complete_array(array, location)
        self._chain = array_chain(array)
        self._location = location

    def nbytes(self, rows: int) -> int:
        """Host memory, in bytes, of a read of `rows` rows, with its buffer."""
        buffer = rows * math.prod(self.shape[3:]) * self.dtype.itemsize
        if self.mapped:  # Zarr copies from the maps of the files
            return buffer
        extent, *within = self._array.chunks[2:]
        chunks = min((rows - 1) // extent + 2, ceil_div(self.shape[2], extent))
        columns = math.prod(ceil_div(size, chunk) for size, chunk in zip(self.shape[3:], within, strict=True))
        decoded = DECODE_COPIES * chunks * columns * self._chain.widest
        return buffer + decoded + INDEX_COPIES * self._chain.index + DECODE_OVERHEAD

    def read(self, batch: int, head: int, start: int, out: NDArray[Any]) -> None:
        """Read the rows from token `start` on into `out` [n, ...], C-contiguous. Raises as `read_span`."""
        if self._files is None:
            read_span(self._array, self._location, (batch, head), start, out)
            return
        step = MOST_FILES * self._array.chunks[2]
        for low in range(0, len(out), step):
            rows = out[low : low + step]
            self._reading.read([(self._files.parts(batch, head, start + low, start + low + len(rows)), rows)])


@dataclass(frozen=True)
class Damage:
    """Tokens [start, stop) of one head that are not as they were written."""

    array: str
    batch: Count
    head: Count
    start: Count
    stop: Count
    reason: str

    def __str__(self) -> str:
        where = f"batch {self.batch}, head {self.head}, tokens {self.start:,} to {self.stop - 1:,}"
        return f"{self.array}, {where}: {self.reason}"


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """The CRC-32 of some rows, which go on after those whose checksum is `before`."""
    native = np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))
    words = native.reshape(-1).view(f"u{native.itemsize}").astype(f"<u{native.itemsize}", copy=False)
    return zlib.crc32(words.view(np.uint8).data, before)


def find_damage(reader: RowReader, recorded: Checksums, step: int, threads: int = 1) -> Iterator[Damage]:
    """Find the damaged parts of an array, in order, with threads that each read `step` rows at a time.

    Raises OSError as the file system does.
    """
    batches, heads, tokens, *row = reader.shape
    rows, of_thread = min(step, recorded.rows, tokens), threading.local()

    def check(part: int, batch: int, head: int, start: int) -> Damage | None:
        if not hasattr(of_thread, "buffer"):
            of_thread.buffer = np.empty((rows, *row), reader.dtype)
        stop = min(start + recorded.rows, tokens)
        reason = _compare_part(reader, of_thread.buffer, (batch, head), range(start, stop), recorded[part])
        return Damage(reader.name, batch, head, start, stop, reason) if reason else None

    places = itertools.product(range(batches), range(heads), range(0, tokens, recorded.rows))
    parts = ((part, *place) for part, place in enumerate(places))
    with ThreadPool(threads, "oocattn-checksum") as pool:
        yield from filter(None, map_in_order(pool, check, parts, 2 * threads))


def _compare_part(reader: RowReader, buffer: NDArray[Any], head: tuple[int, int], tokens: range, expected: str) -> str:
    """How the tokens of a head (batch entry, head) are not as they were written; "" if they are."""
    found = 0
    try:
        for low in tokens[:: len(buffer)]:
            rows = buffer[: min(tokens.stop - low, len(buffer))]
            reader.read(*head, low, rows)
            found = checksum(rows, found)
    except IntegrityError as error:
        return str(error)
    return "" if as_digits(found) == expected else f"checksum {as_digits(found)}, written with {expected}"
