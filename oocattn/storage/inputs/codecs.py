"""Reading rows through Zarr and its codecs: all but plain local chunks.

Zarr reads a chunk that does not exist as its fill value, and decodes a chunk to whatever it decodes to. Here both are
IntegrityErrors, by `CompleteStore`, shards.py (absent chunks within a shard) and decoding.py (bounds).
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore

from oocattn.errors import OocattnError
from oocattn.storage.chunk_errors import chunk_name, damaged_chunk, missing_chunk, refuse_html, torn_chunk, undecodable_chunk
from oocattn.storage.inputs.ahead import MOST_READS
from oocattn.storage.inputs.axes import BHND, Axes
from oocattn.storage.inputs.decoding import array_chain, bounded_metadata
from oocattn.storage.inputs.shard_parts import ShardParts
from oocattn.storage.layout import chunk_bytes, chunk_key, stored_bytes
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
    """Reads rows of one array, with its `axes`, through Zarr. `location` is what messages call the dataset."""

    def __init__(self, array: zarr.Array[Any], location: str, axes: Axes = BHND) -> None:
        self._array = complete_array(array, location)
        self._stored = array
        self._location = location
        self._axes = axes
        self._heads = math.prod(axes.shape(array.shape)[-2 - axes.row_rank : -1 - axes.row_rank])
        self._chain = array_chain(array)
        self._chunk_rows = array.chunks[axes.token_axis]
        self._columns = self._count_columns()
        chunks = max(1, min(STEP_CHUNKS, STEP_BYTES // (self._columns * chunk_bytes(array))))
        self._step_rows = self._chunk_rows * chunks
        self._shards = None if array.shards is None else ShardParts(array, location)
        self._is_local = isinstance(array.store, LocalStore)

    def _count_columns(self) -> int:
        """The most chunks that what a token of a head has lies in, or that of heads which share a chunk."""
        size, extent = self._stored.shape[-1], self._stored.chunks[-1]
        if not self._axes.row_rank:
            return 1
        if self._axes.order[-1] == "f":  # heads begin anywhere in a chunk
            return min(ceil_div(size, extent), ceil_div(self._axes.head_dim, extent) + 1)
        return ceil_div(size, extent)

    @cached_property
    def shared_heads(self) -> int:
        """Heads that a chunk has, of all tensors in it: to decode it for one takes as long as for all."""
        return self._axes.heads_in(self._stored.chunks, self._stored.shape)

    @property
    def has_all_packed(self) -> bool:
        """Whether a chunk has q, k and v of its tokens, with all their heads."""
        spans = zip(self._axes.order, self._stored.chunks, self._stored.shape, strict=True)
        return self._axes.packed and all(extent >= size for axis, extent, size in spans if axis not in "bn")

    @property
    def decode_bytes(self) -> int:
        """Bound on host memory, in bytes, of one read besides the caller's buffers."""
        tokens = self._stored.shape[self._axes.token_axis]
        chunks = min(self._step_rows // self._chunk_rows, ceil_div(tokens, self._chunk_rows)) * self._columns
        return self._bound(chunks, 1)

    def decode_bytes_ahead(self, nbytes: int) -> int:
        """The same bound on several reads that decode so many bytes together, or one chunk each."""
        chunks = max(self._columns, ceil_div(nbytes, chunk_bytes(self._stored)))
        return self._bound(chunks, min(MOST_READS, chunks))

    def _bound(self, chunks: int, reads: int) -> int:
        """The bound on reads of so many chunks, of all of them together."""
        several = max(map(len, self._groups(range(self._heads)))) > 1  # heads whose rows are gathered
        gathered = chunks * chunk_bytes(self._stored) if several or self.has_all_packed else 0
        indices = reads * INDEX_COPIES * self._chain.index
        return DECODE_COPIES * chunks * self._chain.widest + gathered + indices + DECODE_OVERHEAD

    def read(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        """Read tokens [start, stop) of each of some heads into its buffer, [stop - start, D]. Raises as `read_selection`.

        Heads that share chunks are decoded together.
        """
        of_heads = dict(zip(heads, outs, strict=True))
        for group in self._groups(heads):
            self._read_together(batch, {head: of_heads[head] for head in group}, start, stop)

    def read_packed(self, batch: int, start: int, stop: int, wanted: Iterable[tuple[Axes, int, NDArray[Any]]]) -> None:
        """Read tokens of heads of all tensors that are packed, by the axes of each. Each chunk is decoded once."""
        wanted = list(wanted)
        self._check_shards(self._axes.select_all(batch, slice(start, stop)))
        for low, high in _spans(start, stop, self._step_rows):
            found = self._decode_new(self._axes.select_all(batch, slice(low, high)))
            for axes, head, out in wanted:
                part = out[low - start : high - start]
                part[...] = found[axes.select(0, head, slice(None))].reshape(part.shape)

    def _groups(self, heads: Iterable[int]) -> list[list[int]]:
        """Heads by the chunk that they begin in."""
        groups: dict[int, list[int]] = {}
        for head in heads:
            groups.setdefault(self._axes.chunk_of(head, self._stored.chunks), []).append(head)
        return list(groups.values())

    def _read_together(self, batch: int, outs: Mapping[int, NDArray[Any]], start: int, stop: int) -> None:
        """Read tokens of heads that share chunks."""
        heads = range(min(outs), max(outs) + 1)
        self._check_shards(self._axes.select_heads(batch, heads, slice(start, stop)))
        for low, high in _spans(start, stop, self._step_rows):
            selection = self._axes.select_heads(batch, heads, slice(low, high))
            if len(heads) == 1:
                self._decode(selection, outs[heads[0]][low - start : high - start].reshape(self._shape(selection)))
                continue
            found = self._decode_new(selection)
            for head, out in outs.items():
                part = out[low - start : high - start]
                part[...] = found[self._axes.among(head - heads[0])].reshape(part.shape)

    def _shape(self, selection: tuple[slice, ...]) -> list[int]:
        return [len(range(*part.indices(size))) for part, size in zip(selection, self._array.shape, strict=True)]

    def _decode_new(self, selection: tuple[slice, ...]) -> NDArray[Any]:
        found: NDArray[Any] = np.empty(self._shape(selection), self._stored.dtype.newbyteorder("="))
        self._decode(selection, found)
        return found

    def _decode(self, selection: tuple[slice, ...], out: NDArray[Any]) -> None:
        array = self._array
        if self._shards is not None and not self._is_local:
            array = self._shards.fetched(array, selection)
        read_selection(array, self._location, selection, out, self._axes.token_axis)

    def _check_shards(self, selection: tuple[slice, ...]) -> None:
        if self._shards is not None and self._is_local:
            self._shards.check(selection)


def read_span(array: zarr.Array[Any], location: str, index: tuple[int, ...], low: int, out: NDArray[Any]) -> None:
    """Read rows from `low` on of one head of a `complete_array` into `out` [n, ...], as `read_selection` does.

    `index` is (batch, head), or (head,).
    """
    selection = (*(slice(at, at + 1) for at in index), slice(low, low + len(out)), *(slice(None) for _ in out.shape[1:]))
    read_selection(array, location, selection, out.reshape(*(1 for _ in index), *out.shape), len(index))


def read_selection(
    array: zarr.Array[Any], location: str, selection: tuple[slice, ...], out: NDArray[Any], axis: int
) -> None:
    """Read a selection of a `complete_array` into `out`, of its shape and of its dtype in native order.

    Raises IntegrityError for a chunk that is missing or that its codecs refuse, which is named as far as its place along
    `axis`, and OSError as the file system does.
    """
    target: Any = out
    try:
        array.get_basic_selection(selection, out=NDBuffer.from_ndarray_like(target), prototype=buffer_prototype)
    except (OocattnError, OSError, MemoryError):
        raise
    except BaseExceptionGroup as group:  # as Zarr raises what reads of a shard's parts raised
        raise _first_error(group) from group
    except Exception as error:  # each codec has its own: RuntimeError, ValueError, zlib.error, EOFError, ...
        if str(error) == "can't start new thread":  # nor does that say anything of the chunk
            raise OSError(errno.EAGAIN, "cannot start a thread: raise the limit on processes (ulimit -u)") from error
        low, high, rows = selection[axis].start, selection[axis].stop, array.chunks[axis]
        if low // rows == (high - 1) // rows:
            raise undecodable_chunk(location, _key(array, selection), error) from error
        for first, last in _spans(low, high, rows):  # to find out which chunk it is
            within = (*selection[:axis], slice(first, last), *selection[axis + 1 :])
            place = (*(slice(None) for _ in range(axis)), slice(first - low, last - low))
            read_selection(array, location, within, out[place], axis)


def _first_error(error: BaseException) -> BaseException:
    """The first of a group's errors. By itself: among the locals of what raises it, it would be a reference circle."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _key(array: zarr.Array[Any], selection: tuple[slice, ...]) -> str:
    extents = array.shards or array.chunks
    return chunk_key(array, tuple((part.start or 0) // extent for part, extent in zip(selection, extents, strict=True)))


def _spans(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """[start, stop) split at the multiples of `rows`."""
    for low in range(start - start % rows, stop, rows):
        yield max(low, start), min(low + rows, stop)
