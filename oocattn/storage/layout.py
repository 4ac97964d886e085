"""Where an array's chunks lie in its store: extents, keys and offsets.

Pure arithmetic over an array's metadata; nothing here opens a file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from oocattn.storage.inputs.axes import BHND, Axes
from oocattn.storage.inputs.parts import ChunkFile, Part, make_part
from oocattn.units import ceil_div

_OTHER_ORDER = "big" if sys.byteorder == "little" else "little"


@dataclass(frozen=True)
class ChunkFiles:
    """The chunk files of a directly readable array, with its `axes`, under the folder `root`.

    Messages call it `location`.
    """

    array: zarr.Array[Any]
    root: Path
    location: str
    axes: Axes = BHND

    def parts(self, batch: int, head: int, start: int, stop: int) -> list[Part]:
        """Tokens [start, stop) of one head, split at chunk boundaries, in order."""
        extents, axis = self._extents, self.axes.token_axis
        coordinates, shape, inside = [], [], 0
        selected = self.axes.select(batch, head, slice(start, stop))
        for span, size, extent, stride in zip(selected, self._shape, extents, self._strides, strict=True):
            first, last, _ = span.indices(size)
            coordinates.append(first // extent)
            shape.append(last - first)
            inside += first % extent * stride
        inside -= start % extents[axis] * self._strides[axis]
        row, parts = math.prod(shape) // shape[axis], []
        for number in range(start // extents[axis], ceil_div(stop, extents[axis])):
            low, high = max(start, number * extents[axis]), min(stop, (number + 1) * extents[axis])
            coordinates[axis], shape[axis] = number, high - low
            key = chunk_key(self.array, tuple(coordinates))
            file = ChunkFile(self.root / key, self.location, key, self._file_bytes)
            offset = inside + (low - number * extents[axis]) * self._strides[axis]
            parts.append(make_part(file, offset, shape, self._strides, self._dtype, (low - start) * row))
        return parts

    @cached_property
    def _extents(self) -> tuple[int, ...]:
        return self.array.chunks

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self.array.shape

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return stored_dtype(self.array)

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return strides_of(self._extents, self._dtype.itemsize)

    @cached_property
    def _file_bytes(self) -> int:
        return chunk_bytes(self.array)


def strides_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes between neighbours along each axis, where the last one is contiguous."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


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


def obstacles(array: zarr.Array[Any], axes: Axes = BHND) -> list[str]:
    """Why a chunk file does not hold plain numbers, with whole rows; empty where it does."""
    found = []
    if names := codec_names(array):
        found.append(f"{'+'.join(names)}-compressed")
    if array.shards is not None:
        found.append("sharded")
    if array.metadata.zarr_format == 2 and array.order != "C":
        found.append("column-major")
    if axes.row_rank and not _has_whole_rows(array, axes):
        found.append("chunked along D")
    if not (serialized := _serialization(array)).endswith("-endian"):
        found.append(serialized)
    return found


def _has_whole_rows(array: zarr.Array[Any], axes: Axes) -> bool:
    """Whether no chunk boundary divides what a token of a head has."""
    extent, size = array.chunks[-1], array.shape[-1]
    return extent >= size or (axes.order[-1] == "f" and extent % axes.head_dim == 0)


def stored_dtype(array: zarr.Array[Any]) -> np.dtype[Any]:
    """The dtype, as integers, of the elements in a chunk file that has no obstacle."""
    order = ">" if _serialization(array) == "big-endian" else "<"
    return np.dtype(f"{order}u{array.dtype.itemsize}")


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
