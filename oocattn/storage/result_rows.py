"""Rows of a result read through Zarr, whatever its chunks and codecs have become, in memory that is known before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer.cpu import NDBuffer, buffer_prototype

from oocattn.errors import IntegrityError
from oocattn.storage.codecs import DECODE_COPIES, DECODE_OVERHEAD, complete_array
from oocattn.storage.layout import chunk_bytes, stored_bytes
from oocattn.storage.mapped_store import MappedStore


class RowReader:
    """Reads rows of one head of the array `name` [B, H, N, ...] of the result at `location`."""

    def __init__(self, name: str, array: zarr.Array[Any], location: str) -> None:
        self.name = name
        self.shape = array.shape
        self.dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
        self.mapped = isinstance(array.store, MappedStore) and stored_bytes(array) is not None
        self._array = complete_array(array, location)
        self._location = location

    def nbytes(self, rows: int) -> int:
        """Host memory, in bytes, that a read of so many rows takes, with the caller's buffer."""
        buffer = rows * math.prod(self.shape[3:]) * self.dtype.itemsize
        if self.mapped:  # Zarr copies from the maps of the files
            return buffer
        extent, *within = self._array.chunks[2:]
        chunks = min((rows - 1) // extent + 2, -(-self.shape[2] // extent))
        columns = math.prod(-(-size // chunk) for size, chunk in zip(self.shape[3:], within, strict=True))
        return buffer + DECODE_COPIES * chunks * columns * chunk_bytes(self._array) + DECODE_OVERHEAD

    def read(self, batch: int, head: int, start: int, out: NDArray[Any]) -> None:
        """Read as many rows as `out` [n, ...] has, C-contiguous and of dtype `dtype`, from token `start` on.

        Raises IntegrityError for a chunk that is missing, of the wrong size or undecodable, OSError as the file system
        does; `out` is then undefined.
        """
        selection = (slice(batch, batch + 1), slice(head, head + 1), slice(start, start + len(out)))
        target: Any = out[np.newaxis, np.newaxis]
        try:
            self._array.get_basic_selection(selection, out=NDBuffer.from_ndarray_like(target), prototype=buffer_prototype)
        except (IntegrityError, OSError):
            raise
        except Exception as error:  # each codec has its own: RuntimeError, ValueError, zlib.error, EOFError, ...
            raise IntegrityError(
                f"array {self.name!r} of {self._location}: a chunk with these rows cannot be decoded "
                f"({' '.join(str(error).split())}): it is torn or damaged; copy it again"
            ) from error
