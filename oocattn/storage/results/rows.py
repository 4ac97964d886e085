"""Rows of a result read through Zarr, within memory that is known before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.storage.inputs.codecs import DECODE_COPIES, DECODE_OVERHEAD, INDEX_COPIES, complete_array, read_span
from oocattn.storage.inputs.decoding import array_chain
from oocattn.storage.layout import stored_bytes
from oocattn.storage.mapped_store import MappedStore
from oocattn.units import ceil_div


class RowReader:
    """Reads rows of one head of the array `name` [B, H, N, ...]."""

    def __init__(self, name: str, array: zarr.Array[Any], location: str) -> None:
        self.name = name
        self.shape = array.shape
        self.dtype: np.dtype[Any] = array.dtype.newbyteorder("=")
        store = array.store
        self.mapped = isinstance(store, MappedStore) and stored_bytes(array) is not None and store.can_map(array.path)
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
        """Read the rows from token `start` on into `out` [n, ...], C-contiguous.

        Raises IntegrityError for a chunk that is missing, of the wrong size or undecodable, OSError as the file system
        does; `out` is then undefined.
        """
        read_span(self._array, self._location, (batch, head), start, out)
