"""Where an array's chunks lie in its store: extents, keys and offsets.

Pure arithmetic over an array's metadata; nothing here opens a file. Arrays are [H, N, D] or [B, H, N, D], with rows of rank
1, or without D, with rows of rank 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import zarr

from oocattn.units import ceil_div

_OTHER_ORDER = "big" if sys.byteorder == "little" else "little"


@dataclass(frozen=True)
class Part:
    """The bytes of a request in one chunk file. From `offset` of `file_bytes`, they fill [begin, end) of its buffer."""

    key: str
    path: Path
    offset: int
    file_bytes: int
    begin: int
    end: int


@dataclass(frozen=True)
class ChunkFiles:
    """The chunk files of a directly readable array under the folder `root`. Messages call it `location`."""

    array: zarr.Array[Any]
    root: Path
    location: str
    row_rank: int = 1

    def parts(self, batch: int, head: int, start: int, stop: int) -> Iterator[Part]:
        """Tokens [start, stop) of one head, split at chunk boundaries, in order."""
        axis = token_axis(self.array, self.row_rank)
        grouped, rows, row = self._extents[:axis], self._extents[axis], self._extents[axis + 1 :]
        row_bytes = math.prod(row) * self._itemsize
        outer: list[int] = []
        before = 0  # heads that come before this one in the same chunk
        for position, extent in zip((batch, head)[-axis:], grouped, strict=True):
            outer.append(position // extent)
            before = before * extent + position % extent
        for number in range(start // rows, ceil_div(stop, rows)):
            low, high = max(start, number * rows), min(stop, (number + 1) * rows)
            key = chunk_key(self.array, (*outer, number, *(0 for _ in row)))
            offset = (before * rows + low - number * rows) * row_bytes
            begin, end = (low - start) * row_bytes, (high - start) * row_bytes
            yield Part(key, self.root / key, offset, self._file_bytes, begin, end)

    @cached_property
    def _extents(self) -> tuple[int, ...]:
        return self.array.chunks

    @cached_property
    def _itemsize(self) -> int:
        return self.array.dtype.itemsize

    @cached_property
    def _file_bytes(self) -> int:
        return chunk_bytes(self.array)


def token_axis(array: zarr.Array[Any], row_rank: int) -> int:
    """The dimension of tokens: after those of the heads, before those of a row."""
    return array.ndim - 1 - row_rank


def chunk_bytes(array: zarr.Array[Any]) -> int:
    """Bytes of one decoded chunk."""
    return math.prod(array.chunks) * array.dtype.itemsize


def stored_bytes(array: zarr.Array[Any]) -> int | None:
    """Bytes of a chunk as it is stored, or None where that depends on its content."""
    if codec_names(array) or array.shards is not None or not _serialization(array).endswith("-endian"):
        return None
    return chunk_bytes(array)


def chunk_key(array: zarr.Array[Any], coordinates: tuple[int, ...]) -> str:
    """The key of the stored object at `coordinates`, from the store's root."""
    key = array.metadata.encode_chunk_key(coordinates)
    return f"{array.store_path.path}/{key}" if array.store_path.path else key


def stored_chunks(array: zarr.Array[Any]) -> Iterator[tuple[int, ...]]:
    """Coordinates of every stored object (chunk, or shard) that the array must have."""
    counts = stored_counts(array)
    for number in range(math.prod(counts)):  # itertools.product would list every dimension first
        yield coordinates_of(number, counts)


def stored_counts(array: zarr.Array[Any]) -> list[int]:
    """How many stored objects (chunks, or shards) lie along each dimension."""
    return [ceil_div(size, extent) for size, extent in zip(array.shape, array.shards or array.chunks, strict=True)]


def coordinates_of(number: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of object `number`, in C order, on a grid of `counts`."""
    found = []
    for count in reversed(counts):
        number, at = divmod(number, count)
        found.append(at)
    return tuple(reversed(found))


def codec_names(array: zarr.Array[Any]) -> list[str]:
    """The names of the filters and compressors that a chunk passes through."""
    names = []
    for codec in (*array.filters, *array.compressors):
        config = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
        names.append(str(config.get("name", config.get("id"))))
    return names


def obstacles(array: zarr.Array[Any], row_rank: int = 1) -> list[str]:
    """Why a chunk file is not plain little-endian rows; empty where it is."""
    row = token_axis(array, row_rank) + 1
    found = []
    if names := codec_names(array):
        found.append(f"{'+'.join(names)}-compressed")
    if array.shards is not None:
        found.append("sharded")
    if array.metadata.zarr_format == 2 and array.order != "C":
        found.append("column-major")
    if array.chunks[row:] != array.shape[row:]:
        found.append("chunked along D")
    if (serialized := _serialization(array)) != "little-endian":
        found.append(serialized)
    return found


def _serialization(array: zarr.Array[Any]) -> str:
    """How the elements of a decoded chunk are stored."""
    if array.metadata.zarr_format == 2:
        native = array.dtype == array.dtype.newbyteorder("=")
        return f"{sys.byteorder if native else _OTHER_ORDER}-endian"
    serializer: Any = array.serializer
    config = serializer.to_dict()
    if config["name"] != "bytes":
        return f"{config['name']}-encoded"
    return f"{config.get('configuration', {}).get('endian', 'little')}-endian"
