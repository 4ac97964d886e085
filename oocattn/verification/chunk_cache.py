"""Decoded chunks of keys and values that tiles are read from: a chunk that has many tiles is decoded once.

Any thread may read any rows. What is kept is a matter of time alone, never of what is read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from oocattn.storage.inputs.ahead import cut_at_multiples
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.source import TensorSource
from oocattn.units import ceil_div

_Key = tuple[str, int, int, int]  # name, batch entry, head, and number of the chunk along the tokens


class _Chunk:
    """The rows of a head in a chunk, once they are decoded, and how many threads use them."""

    def __init__(self) -> None:
        self.rows: NDArray[Any] | None = None
        self.users, self.decoding = 0, threading.Lock()


class ChunkCache:
    """Reads rows of k and v of a dataset, and keeps `most` chunks of those that are decoded and have several tiles.

    The one that was not used for the longest time is dropped.
    """

    def __init__(self, arrays: Mapping[str, TensorSource], keys: int, most: int) -> None:
        self._arrays, self._most = arrays, most
        self._kept = {name for name in "kv" if most and has_several_tiles(arrays[name], keys)}
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()
        self._changing = threading.Lock()

    def read(self, name: Literal["k", "v"], batch: int, head: int, rows: range, out: NDArray[Any]) -> None:
        """Read rows of a head, as `TensorSource.read_rows`."""
        array = self._arrays[name]
        if name not in self._kept:
            array.read_rows(batch, head, rows.start, rows.stop, out)
            return
        for part in cut_at_multiples(rows, array.chunk_rows):
            into = out[part.start - rows.start : part.stop - rows.start]
            number = part.start // array.chunk_rows
            with self._used((name, batch, head, number)) as chunk:
                if chunk is None:
                    array.read_rows(batch, head, part.start, part.stop, into)
                    continue
                first = number * array.chunk_rows
                into[...] = self._decoded(chunk, array, batch, head, first)[part.start - first : part.stop - first]

    @contextmanager
    def _used(self, key: _Key) -> Iterator[_Chunk | None]:
        """A chunk, which is not dropped meanwhile; None where all that are kept are in use."""
        with self._changing:
            chunk = self._enter(key)
        try:
            yield chunk
        finally:
            if chunk is not None:
                with self._changing:
                    chunk.users -= 1

    def _enter(self, key: _Key) -> _Chunk | None:
        chunk = self._chunks.get(key)
        if chunk is None:
            if len(self._chunks) == self._most:
                unused = next((old for old, other in self._chunks.items() if not other.users), None)
                if unused is None:
                    return None
                self._chunks.pop(unused).rows = None
            chunk = self._chunks[key] = _Chunk()
        self._chunks.move_to_end(key)
        chunk.users += 1
        return chunk

    def _decoded(self, chunk: _Chunk, array: TensorSource, batch: int, head: int, first: int) -> NDArray[Any]:
        """The rows of a chunk, the first of which is `first`. Threads that want them wait for the one that decodes them."""
        with chunk.decoding:
            if chunk.rows is None:
                stop = min(first + array.chunk_rows, array.extents[2])
                rows = np.empty((stop - first, *array.row_shape), array.dtype)
                array.read_rows(batch, head, first, stop, rows)
                chunk.rows = rows
            return chunk.rows


def has_several_tiles(array: TensorSource, keys: int) -> bool:
    """Whether chunks are decoded, and have more rows than a tile of so many keys."""
    return not array.direct and array.chunk_rows > keys


def most_chunks(dataset: Dataset, keys: int, threads: int) -> int:
    """Chunks that are worth to be kept for so many threads: those that the tiles in flight lie in."""
    arrays = [dataset.arrays[name] for name in "kv" if has_several_tiles(dataset.arrays[name], keys)]
    return sum(ceil_div(threads * keys, array.chunk_rows) + 1 for array in arrays)


def chunk_bytes(dataset: Dataset, keys: int) -> int:
    """Bytes of the largest chunk that is kept, at most."""
    arrays = [dataset.arrays[name] for name in "kv" if has_several_tiles(dataset.arrays[name], keys)]
    return max((min(array.chunk_rows, array.extents[2]) * array.row_bytes for array in arrays), default=0)
