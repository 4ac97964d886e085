"""Reading rows through Zarr and its codecs: whatever is not a plain local chunk file, correctly and at its own speed.

Zarr reads a chunk that does not exist as its fill value. Here that is an IntegrityError: `CompleteStore` refuses absent
keys, and `check_shard` looks for absent chunks within a shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.buffer.cpu import NDBuffer, buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath, WrapperStore

from oocattn.errors import OocattnError
from oocattn.storage.layout import chunk_bytes, chunk_key, codec_names, leading, missing_chunk, undecodable, wrong_size

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

STEP_BYTES = 32 * 2**20
"""Decoded bytes of the chunks that Zarr is asked for at a time, at most, unless one chunk is larger."""

DECODE_COPIES = 4
"""Bound on the copies of a step that live at once: as stored, as decompressed, as filtered, and a shard's result."""

DECODE_OVERHEAD = 8 * 2**20
"""Bytes for what does not grow with the step: codec contexts, metadata, a shard's index."""

_ABSENT = 2**64 - 1
"""Offset and length of a chunk that a shard does not hold (Zarr v3 sharding codec, binary shard format)."""

_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


class CompleteStore(WrapperStore["Store"]):
    """A store of whole chunks: an absent key is an error, and so is, where `blosc` is set, a Blosc chunk cut short.

    Blosc decodes a buffer that is too short without noticing, reading past its end; its header says how long it must be
    (bytes 12 to 15, c-blosc's README_CHUNK_FORMAT). `location` is for the message.
    """

    def __init__(self, store: Store, location: str = "", blosc: bool = False) -> None:
        super().__init__(store)
        self._location = location
        self._blosc = blosc

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of `key`. Raises IntegrityError if there is none, or not all of it."""
        return self._whole(key, await self._store.get(key, prototype, byte_range))

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As `get`, where the wrapped store reads synchronously."""
        store: Any = self._store
        return self._whole(key, store.get_sync(key, prototype=prototype, byte_range=byte_range))

    def _whole(self, key: str, value: Buffer | None) -> Buffer:
        if value is None:
            raise missing_chunk(self._location, key)
        if self._blosc:
            expected = int.from_bytes(value[12:16].to_bytes(), "little")
            if len(value) < 16 or len(value) != expected:
                raise wrong_size(self._location, key, len(value), expected)
        return value


def complete_array(array: zarr.Array[Any], location: str) -> zarr.Array[Any]:
    """The same array, of which every read of a chunk that is absent is an IntegrityError."""
    blosc = array.shards is None and codec_names(array)[-1:] == ["blosc"]
    path = StorePath(CompleteStore(array.store, location, blosc), array.path)
    metadata: Any = array.metadata
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=path))


class CodecReader:
    """Reads rows of one array through Zarr. `location` is what messages call the dataset."""

    def __init__(self, array: zarr.Array[Any], location: str) -> None:
        self._array = complete_array(array, location)
        self._location = location
        self._chunk_rows = array.chunks[-2]
        columns = -(-array.shape[-1] // array.chunks[-1])
        self._row_of_chunks_bytes = columns * chunk_bytes(array)
        self._step_rows = self._chunk_rows * max(1, STEP_BYTES // self._row_of_chunks_bytes)
        self._whole_shards: set[str] = set()

    @property
    def decode_bytes(self) -> int:
        """Bound on the host memory, in bytes, that one read needs besides the caller's buffer."""
        tokens = -(-self._array.shape[-2] // self._chunk_rows)
        step = min(self._step_rows // self._chunk_rows, tokens) * self._row_of_chunks_bytes
        return DECODE_COPIES * step + DECODE_OVERHEAD

    def read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read tokens [start, stop) of one head into `out` [stop - start, D], of the array's dtype in native order.

        Raises IntegrityError for a chunk that is missing or that its codecs refuse.
        """
        index = leading(self._array, batch, head)
        for shard in self._shards(index, start, stop):
            if (key := chunk_key(self._array, shard)) not in self._whole_shards:
                check_shard(self._array, shard, self._location)
                self._whole_shards.add(key)
        for low, high in _spans(start, stop, self._step_rows):
            self._read_span(index, low, high, out[low - start : high - start])

    def _shards(self, index: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, ...]]:
        if self._array.shards is None:
            return iter(())
        *grouped, rows, columns = self._array.shards
        outer = [range(at // extent, at // extent + 1) for at, extent in zip(index, grouped, strict=True)]
        tokens = range(start // rows, -(-stop // rows))
        return itertools.product(*outer, tokens, range(-(-self._array.shape[-1] // columns)))

    def _read_span(self, index: tuple[int, ...], low: int, high: int, out: NDArray[Any]) -> None:
        selection = (*(slice(at, at + 1) for at in index), slice(low, high), slice(None))
        target: Any = out.reshape(*(1 for _ in index), *out.shape)
        try:
            self._array.get_basic_selection(selection, out=NDBuffer.from_ndarray_like(target), prototype=buffer_prototype)
        except (OocattnError, OSError):
            raise
        except Exception as error:  # each codec has its own: RuntimeError, ValueError, zlib.error, EOFError, ...
            if low // self._chunk_rows == (high - 1) // self._chunk_rows:
                raise undecodable(self._location, self._key(index, low), error) from error
            for first, last in _spans(low, high, self._chunk_rows):  # to find out which chunk it is
                self._read_span(index, first, last, out[first - low : last - low])

    def _key(self, index: tuple[int, ...], token: int) -> str:
        extents = self._array.shards or self._array.chunks
        position = (*index, token, 0)
        return chunk_key(self._array, tuple(at // extent for at, extent in zip(position, extents, strict=True)))


def _spans(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) split at the multiples of `rows`."""
    for low in range(start - start % rows, stop, rows):
        yield max(low, start), min(low + rows, stop)


def check_shard(array: zarr.Array[Any], shard: tuple[int, ...], location: str, file_bytes: int | None = None) -> None:
    """Check that the shard at these coordinates exists and that its index lists every chunk within the array's bounds.

    Given the size of the shard's file, no chunk may lie beyond it. Reads the index alone: 16 bytes a chunk. An index in
    an encoding other than the usual one (little-endian, with or without crc32c) is left for Zarr to read. Raises
    IntegrityError.
    """
    assert array.shards is not None
    key = chunk_key(array, shard)
    counts = tuple(extent // chunk for extent, chunk in zip(array.shards, array.chunks, strict=True))
    sharding: Any = array.metadata.to_dict()["codecs"]
    config = sharding[0]["configuration"]
    encoding = list(config["index_codecs"])
    checked = encoding[1:] == [{"name": "crc32c"}]
    size = 16 * math.prod(counts) + (4 if checked else 0)
    window = RangeByteRequest(0, size) if config["index_location"] == "start" else SuffixByteRequest(size)
    content = sync(array.store.get(key, buffer_prototype, window))
    if content is None:
        raise missing_chunk(location, key)
    if encoding[: 1 if checked else None] != [_LITTLE_ENDIAN]:
        return
    if len(content) != size:
        raise undecodable(location, key, f"its index has {len(content)} bytes of {size}")
    index = np.frombuffer(content.to_bytes(), "<u8", 2 * math.prod(counts)).reshape(*counts, 2)[_inside(array, shard)]
    absent = np.argwhere((index == _ABSENT).all(axis=-1))
    if len(absent):
        raise missing_chunk(location, f"{key}, chunk {'/'.join(map(str, absent[0]))} of the shard")
    if file_bytes is not None and (np.any(index > file_bytes) or np.any(index.sum(axis=-1) > file_bytes)):
        raise undecodable(location, key, f"its index points beyond its {file_bytes} bytes")


def _inside(array: zarr.Array[Any], shard: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a shard's grid of chunks that lies within the array."""
    assert array.shards is not None
    return tuple(
        slice(-(-min(extent, size - at * extent) // chunk))
        for at, extent, size, chunk in zip(shard, array.shards, array.shape, array.chunks, strict=True)
    )
