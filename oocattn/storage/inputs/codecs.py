"""Reading rows through Zarr and its codecs: all but plain local chunks.

Zarr reads a chunk that does not exist as its fill value, and decodes a chunk to whatever it decodes to. Here both are
IntegrityErrors, by `CompleteStore`, shards.py (absent chunks within a shard) and decoding.py (bounds).
"""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Iterator
from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore

from oocattn.errors import OocattnError
from oocattn.storage.chunk_errors import chunk_name, damaged_chunk, missing_chunk, refuse_html, torn_chunk, undecodable_chunk
from oocattn.storage.inputs.decoding import array_chain, bounded_metadata
from oocattn.storage.inputs.shards import check_shard
from oocattn.storage.layout import chunk_bytes, chunk_key, stored_bytes, token_axis
from oocattn.storage.zarr_compat import (
    Buffer,
    BufferPrototype,
    ByteRequest,
    NDBuffer,
    RangeByteRequest,
    Store,
    array_at,
    buffer_prototype,
)
from oocattn.units import ceil_div

STEP_BYTES = 32 * 2**20
"""Decoded bytes of the chunks that Zarr is asked for at a time, at most, unless one chunk is larger."""

STEP_CHUNKS = 1024  # how many chunks it is asked for at a time, at most: each is a task of its own, with some kilobytes
DECODE_COPIES = 4
"""Bound on the copies of a step that live at once: as stored, as decompressed, as filtered, and a shard's result."""

DECODE_OVERHEAD = 8 * 2**20
"""Bytes for what does not grow with the step: codec contexts, metadata."""

INDEX_COPIES = 4
"""Bound on the copies of a shard's index: as stored, as numbers, sorted, and Zarr's own."""


class CompleteStore(WrapperStore[Store]):
    """A store of whole chunks: an absent or oversized object is an error.

    An object may have `most` bytes, or must have `exact` ones. No more than that is fetched of a remote object; local ones
    are mapped. `location` is for the message.
    """

    def __init__(self, store: Store, location: str = "", most: int = 2**63 - 1, exact: int | None = None) -> None:
        super().__init__(store)
        self._location, self._most, self._exact = location, most, exact

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of `key`. Raises IntegrityError if there is none, or more than a chunk can have."""
        window = byte_range
        if byte_range is None and not isinstance(self._store, LocalStore):
            window = RangeByteRequest(0, self._most + 1)
        value = self._check_whole(key, await self._store.get(key, prototype, window))
        if byte_range is None:
            self._check_content(key, value)
        return value

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As `get`, where the wrapped store reads synchronously."""
        store: Any = self._store
        return self._check_whole(key, store.get_sync(key, prototype=prototype, byte_range=byte_range))

    if hasattr(Store, "get_ranges"):  # from zarr 3.2 on: by `get`, not by the wrapped store's own
        get_ranges = Store.get_ranges

    def _check_content(self, key: str, value: Buffer) -> None:
        refuse_html(chunk_name(self._location, key), value[:64].to_bytes())
        if self._exact is not None and len(value) != self._exact:
            raise torn_chunk(self._location, key, len(value), self._exact)

    def _check_whole(self, key: str, value: Buffer | None) -> Buffer:
        if value is None:
            raise missing_chunk(self._location, key)
        if len(value) > self._most:
            raise damaged_chunk(self._location, key, f"has more than {self._most} bytes, the most that it can have")
        return value


def complete_array(array: zarr.Array[Any], location: str) -> zarr.Array[Any]:
    """The same array, to read: absent and oversized chunks are IntegrityErrors. Raises ProblemError as `array_chain`."""
    store = CompleteStore(array.store, location, array_chain(array).stored, stored_bytes(array))
    return array_at(store, array.path, bounded_metadata(array))


class CodecReader:
    """Reads rows of one array through Zarr. `location` is what messages call the dataset."""

    def __init__(self, array: zarr.Array[Any], location: str, row_rank: int = 1) -> None:
        self._array = complete_array(array, location)
        self._stored = array
        self._location = location
        self._chain = array_chain(array)
        self._axis = axis = token_axis(array, row_rank)
        self._chunk_rows = array.chunks[axis]
        row = zip(array.shape[axis + 1 :], array.chunks[axis + 1 :], strict=True)
        self._columns = math.prod(ceil_div(size, extent) for size, extent in row)
        chunks = max(1, min(STEP_CHUNKS, STEP_BYTES // (self._columns * chunk_bytes(array))))
        self._step_rows = self._chunk_rows * chunks
        self._whole_shards: set[str] = set()

    @property
    def decode_bytes(self) -> int:
        """Bound on host memory, in bytes, of one read besides the caller's buffer."""
        chunks = (
            min(self._step_rows // self._chunk_rows, ceil_div(self._array.shape[self._axis], self._chunk_rows))
            * self._columns
        )
        return DECODE_COPIES * chunks * self._chain.widest + INDEX_COPIES * self._chain.index + DECODE_OVERHEAD

    def read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read tokens [start, stop) of one head into `out` [stop - start, D]. Raises as `read_span`."""
        index = (batch, head)[-self._axis :]
        for shard in self._shards(index, start, stop):
            if (key := chunk_key(self._array, shard)) not in self._whole_shards:
                check_shard(self._stored, shard, self._location)
                self._whole_shards.add(key)
        for low, high in _spans(start, stop, self._step_rows):
            read_span(self._array, self._location, index, low, out[low - start : high - start])

    def _shards(self, index: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, ...]]:
        if self._array.shards is None:
            return iter(())
        extents, axis = self._array.shards, self._axis
        outer = [range(at // extent, at // extent + 1) for at, extent in zip(index, extents, strict=False)]
        tokens = range(start // extents[axis], ceil_div(stop, extents[axis]))
        row = zip(self._array.shape[axis + 1 :], extents[axis + 1 :], strict=True)
        return itertools.product(*outer, tokens, *(range(ceil_div(size, extent)) for size, extent in row))


def read_span(array: zarr.Array[Any], location: str, index: tuple[int, ...], low: int, out: NDArray[Any]) -> None:
    """Read rows from `low` on of one head of a `complete_array` into `out`.

    `out` is [n, ...], of its dtype in native order. `index` is (batch, head), or (head,). Raises IntegrityError for a
    chunk that is missing or that its codecs refuse, which is named, and OSError as the file system does.
    """
    high, rows = low + len(out), array.chunks[len(index)]
    selection = (*(slice(at, at + 1) for at in index), slice(low, high))
    target: Any = out.reshape(*(1 for _ in index), *out.shape)
    try:
        array.get_basic_selection(selection, out=NDBuffer.from_ndarray_like(target), prototype=buffer_prototype)
    except (OocattnError, OSError, MemoryError):
        raise
    except BaseExceptionGroup as group:  # as Zarr raises what reads of a shard's parts raised
        raise _first_error(group) from group
    except Exception as error:  # each codec has its own: RuntimeError, ValueError, zlib.error, EOFError, ...
        if str(error) == "can't start new thread":  # nor does that say anything of the chunk
            raise OSError(errno.EAGAIN, "cannot start a thread: raise the limit on processes (ulimit -u)") from error
        if low // rows == (high - 1) // rows:
            raise undecodable_chunk(location, _key(array, index, low), error) from error
        for first, last in _spans(low, high, rows):  # to find out which chunk it is
            read_span(array, location, index, first, out[first - low : last - low])


def _first_error(error: BaseException) -> BaseException:
    """The first of a group's errors. By itself: among the locals of what raises it, it would be a reference circle."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _key(array: zarr.Array[Any], index: tuple[int, ...], token: int) -> str:
    extents = array.shards or array.chunks
    position = (*index, token, *(0 for _ in extents[len(index) + 1 :]))
    return chunk_key(array, tuple(at // extent for at, extent in zip(position, extents, strict=True)))


def _spans(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) split at the multiples of `rows`."""
    for low in range(start - start % rows, stop, rows):
        yield max(low, start), min(low + rows, stop)
