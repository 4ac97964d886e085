"""Chunks in shards of a store that lets requests wait: those that a read needs are fetched at the same time.

Zarr asks for them one after another, each time after the shard's index. Here the index is kept, chunks that lie side by side
are one request, a shard that is read as a whole is one together with its index, and Zarr finds what it asks for.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import zarr
from zarr.storage import WrapperStore

from oocattn.storage.inputs.shards import check_shard, stretches_of
from oocattn.storage.layout import chunk_key
from oocattn.storage.remote.store import all_of
from oocattn.storage.zarr_compat import (
    Buffer,
    BufferPrototype,
    ByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
    array_at,
    buffer_prototype,
    sync,
)
from oocattn.units import ceil_div

KEPT_BYTES = 2 << 20
"""Bytes of indices that are kept, of the shards that were read last."""


class _Fetched(WrapperStore[Store]):
    """A store of which some parts are here: `whole` objects, of others the index, by its length, and stretches of bytes."""

    def __init__(
        self,
        store: Store,
        whole: Mapping[str, Buffer],
        indices: Mapping[str, Buffer],
        parts: Mapping[str, Sequence[tuple[int, Buffer]]],
    ) -> None:
        super().__init__(store)
        self._whole, self._indices, self._parts = whole, indices, parts

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of `key`, or the part of it in `byte_range`: what is here is not asked for."""
        found = self._find(key, byte_range)
        return await self._store.get(key, prototype, byte_range) if found is None else found

    if hasattr(Store, "get_ranges"):  # from zarr 3.2 on: by `get`, not by the wrapped store's own
        get_ranges = Store.get_ranges

    def _find(self, key: str, byte_range: ByteRequest | None) -> Buffer | None:
        whole = self._whole.get(key)
        if whole is not None:
            return _cut(whole, byte_range)
        index = self._indices.get(key)
        if isinstance(byte_range, SuffixByteRequest):
            return index if index is not None and byte_range.suffix == len(index) else None
        if not isinstance(byte_range, RangeByteRequest):
            return None
        for start, part in self._parts.get(key, []):
            if start <= byte_range.start and byte_range.end <= start + len(part):
                return part[byte_range.start - start : byte_range.end - start]
        at_start = index is not None and (byte_range.start, byte_range.end) == (0, len(index))
        return index if at_start else None


def _cut(whole: Buffer, byte_range: ByteRequest | None) -> Buffer:
    """The part of an object that is in `byte_range`."""
    if isinstance(byte_range, SuffixByteRequest):
        return whole[max(0, len(whole) - byte_range.suffix) :]
    if isinstance(byte_range, RangeByteRequest):
        return whole[byte_range.start : byte_range.end]
    return whole if byte_range is None else whole[byte_range.offset :]


class ShardParts:
    """The shards of one array, each checked before it is read first. `location` is what messages call the dataset."""

    def __init__(self, stored: zarr.Array[Any], location: str) -> None:
        assert stored.shards is not None
        self._stored, self._location = stored, location
        self._shards, self._chunks = stored.shards, stored.chunks
        described: Any = stored.metadata.to_dict()["codecs"]
        self._config = described[0]["configuration"]
        self._counts = tuple(shard // chunk for shard, chunk in zip(self._shards, self._chunks, strict=True))
        self._checked: set[str] = set()
        self._indices: dict[str, Future[Buffer]] = {}
        self._changing = threading.Lock()

    def check(self, selection: tuple[slice, ...]) -> None:
        """Check the shards of a selection that were not checked before, as `check_shard` does: `fetched` does so itself."""
        for shard in self._shards_of(selection):
            if chunk_key(self._stored, shard) not in self._checked:
                self._index(shard)

    def fetched(self, array: zarr.Array[Any], selection: tuple[slice, ...]) -> zarr.Array[Any]:
        """The array, a `complete_array` of this one, with the chunks of a selection here, of shards that are checked."""
        indices: dict[str, Buffer] = {}
        whole: dict[str, tuple[int, ...]] = {}
        wanted: list[tuple[str, RangeByteRequest | None]] = []
        for shard in self._shards_of(selection):
            within, key = self._chunks_of(selection, shard), chunk_key(self._stored, shard)
            if all(len(part) == count for part, count in zip(within, self._counts, strict=True)):
                whole[key] = shard
                wanted.append((key, None))
                continue
            indices[key] = self._index(shard)
            stretches = stretches_of(indices[key], self._config, self._counts)
            chosen = stretches[np.ix_(*within)].reshape(-1, 2)
            wanted += [(key, RangeByteRequest(start, stop)) for start, stop in _joined(chosen.tolist())]
        contents = sync(all_of(array.store.get(key, buffer_prototype, part) for key, part in wanted))
        parts: dict[str, list[tuple[int, Buffer]]] = {}
        objects: dict[str, Buffer] = {}
        for (key, part), content in zip(wanted, contents, strict=True):
            assert content is not None  # or it would have raised
            if part is None:
                objects[key] = content
            else:
                parts.setdefault(key, []).append((part.start, content))
        stored = array_at(_Fetched(array.store, objects, indices, parts), array.path, self._stored.metadata)
        for key, shard in whole.items():
            index = check_shard(stored, shard, self._location, len(objects[key]))
            found = Future[Buffer]()
            found.set_result(type(index).from_bytes(index.to_bytes()))  # not a part of the whole, which would stay
            self._keep(key, found)
        return array_at(stored.store, array.path, array.metadata)

    def _index(self, shard: tuple[int, ...]) -> Buffer:
        """The index of a shard, which is checked whenever it is read; reads that need the same one share a request."""
        key = chunk_key(self._stored, shard)
        with self._changing:
            found = self._indices.get(key)
            mine = found is None
            if found is None:
                found = self._indices[key] = Future[Buffer]()
        if not mine:
            return found.result()
        try:
            found.set_result(check_shard(self._stored, shard, self._location))
        except BaseException as error:
            found.set_exception(error)
            with self._changing:
                del self._indices[key]
            raise
        self._keep(key, found)
        return found.result()

    def _keep(self, key: str, found: Future[Buffer]) -> None:
        """Keep the index of a shard that was checked, unless one is asked for; let go of those that are too many."""
        with self._changing:
            self._checked.add(key)
            self._indices.setdefault(key, found)
            most = max(1, KEPT_BYTES // len(found.result()))
            for other in list(self._indices)[: max(0, len(self._indices) - most)]:
                if self._indices[other].done():
                    del self._indices[other]

    def _shards_of(self, selection: tuple[slice, ...]) -> Iterator[tuple[int, ...]]:
        spans = zip(selection, self._stored.shape, self._shards, strict=True)
        found = [(part.indices(size), extent) for part, size, extent in spans]
        return itertools.product(*(range(low // extent, ceil_div(high, extent)) for (low, high, _), extent in found))

    def _chunks_of(self, selection: tuple[slice, ...], shard: tuple[int, ...]) -> list[range]:
        """The chunks of a shard that a selection touches, along each axis."""
        found = []
        for part, size, at, extent, step in zip(
            selection, self._stored.shape, shard, self._shards, self._chunks, strict=True
        ):
            low, high, _ = part.indices(size)
            first, last = max(low - at * extent, 0), min(high - at * extent, extent)
            found.append(range(first // step, ceil_div(last, step)))
        return found


def _joined(stretches: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Stretches of bytes, (offset, length), with those that lie side by side in one, as start and stop."""
    start = stop = -1
    for offset, length in sorted(map(tuple, stretches)):
        if offset == stop:
            stop += length
            continue
        if stop > start:
            yield start, stop
        start, stop = offset, offset + length
    if stop > start:
        yield start, stop
