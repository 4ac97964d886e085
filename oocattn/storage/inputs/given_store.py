"""Stores of Zarr that a caller opened, of any class, seen from one of their nodes and only read."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from zarr.storage import MemoryStore, ObjectStore, ZipStore

from oocattn.storage.inputs.kept import keep, recall
from oocattn.storage.remote.limits import current_limit
from oocattn.storage.remote.store import all_of
from oocattn.storage.remote.transient import retry
from oocattn.storage.zarr_compat import (
    Buffer,
    BufferPrototype,
    ByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
    buffer_prototype,
    unwrapped,
)

ASKED = 64
"""Objects that are asked for at the same time."""

READ_BYTES = 16 << 20
"""Bytes of objects that are read whole at the same time, or one that is larger."""

T = TypeVar("T")


class GivenStore(Store):
    """The part of a caller's store below `prefix`. Transient failures are retried; RemoteErrors name store and key."""

    supports_writes = False
    supports_deletes = False

    def __init__(self, store: Store, prefix: str = "") -> None:
        super().__init__(read_only=True)
        self._is_open = True
        self._given = store
        self._prefix = prefix
        self._limit = current_limit()
        self._token = keep(self)
        self._inner = inner = unwrapped(store)
        self.location = f"{type(inner).__name__}/{prefix}".rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._inner, ZipStore | ObjectStore) or self._snapshot:
            return GivenStore, (self._given, self._prefix)
        return recall, (self._token, f"what is in {self.location}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenStore) and (self._given, self._prefix) == (other._given, other._prefix)

    __hash__ = object.__hash__

    @property
    def _is_icechunk(self) -> bool:
        return type(self._inner).__module__.partition(".")[0] == "icechunk"

    @property
    def _snapshot(self) -> str:
        """What a session of Icechunk shows, where that can no longer change; else ""."""
        session = getattr(self._inner, "session", None) if self._is_icechunk else None
        return str(session.snapshot_id) if session is not None and session.read_only else ""

    @property
    def given(self) -> Store:
        """The caller's store."""
        return self._given

    @property
    def prefix(self) -> str:
        """Where in the caller's store the node is."""
        return self._prefix

    @property
    def file(self) -> Path | None:
        """The local file that the store is; None where it is none."""
        return Path(self._inner.path).absolute() if isinstance(self._inner, ZipStore) else None

    @property
    def in_memory(self) -> bool:
        """Whether it is in the memory of this process, so that reading all of it costs little."""
        return isinstance(self._inner, MemoryStore)

    @property
    def supports_listing(self) -> bool:
        """Whether the keys can be listed."""
        return self._given.supports_listing

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}".strip("/")

    async def _retry(self, operation: str, key: str, step: Callable[[], Awaitable[T]]) -> T:
        return await retry(operation, f"{self.location}/{key}", step, limit=self._limit)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of `key`, or the part of it in `byte_range`; None if there is none."""

        async def step() -> Buffer | None:
            await self._given._ensure_open()
            try:
                within = await self._bound(key, byte_range)
                return await self._given.get(self._key(key), prototype or buffer_prototype, within)
            except KeyError:  # so Icechunk says that it has no such key
                return None

        return await self._retry("reading", key, step)

    async def _bound(self, key: str, byte_range: ByteRequest | None) -> ByteRequest | None:
        """The same range, within the object: Icechunk takes no other, and counts the end of an object from its beginning."""
        if byte_range is None or not self._is_icechunk or not await self._given.exists(self._key(key)):
            return byte_range
        size = await self._given.getsize(self._key(key))
        if isinstance(byte_range, SuffixByteRequest):
            return RangeByteRequest(max(0, size - byte_range.suffix), size)
        if isinstance(byte_range, RangeByteRequest):
            return RangeByteRequest(min(byte_range.start, size), min(byte_range.end, size))
        return byte_range

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several (key, range), in order; None where one is missing."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is such a key."""

        async def step() -> bool:
            await self._given._ensure_open()
            try:
                return await self._given.exists(self._key(key))
            except KeyError:
                return False

        return await self._retry("looking for", key, step)

    async def find_sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        """The keys that there are, with their sizes where that takes no reading."""

        async def find(key: str) -> list[tuple[str, int | None]]:
            if not await self.exists(key):
                return []
            told = isinstance(self._inner, MemoryStore) or type(self._inner).getsize is not Store.getsize
            return [(key, await self._given.getsize(self._key(key)) if told else None)]

        return {key: size for found in await all_of(map(find, keys)) for key, size in found}

    async def list_sizes(self, prefix: str) -> dict[str, int | None]:
        """None: keys are asked for by name."""
        return {}

    async def find_versions(self, keys: Iterable[str], object_bytes: int) -> list[str]:
        """What tells the content of keys from others: the store's snapshot, its file's time, entity tags, or checksums.

        The objects have about `object_bytes` each.
        """
        if self._snapshot:
            return [self._snapshot]
        if self.file is not None:
            status = os.stat(self.file)
            return [f"{status.st_size} {status.st_mtime_ns}"]
        reading = asyncio.Semaphore(max(1, READ_BYTES // max(1, object_bytes)))
        return await all_of(self._find_version(key, reading) for key in keys)

    async def _find_version(self, key: str, reading: asyncio.Semaphore) -> str:
        if isinstance(self._inner, ObjectStore):
            found = await self._retry("looking at", key, lambda: self._head(key))
            if found["e_tag"]:
                return str(found["e_tag"])
        async with reading:
            content = await self.get(key)
            return "" if content is None else f"{len(content)} {zlib.crc32(content.as_numpy_array().data)}"

    async def _head(self, key: str) -> Any:
        import obstore

        inner: Any = self._inner
        return await obstore.head_async(inner.store, self._key(key))

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The keys that begin so."""
        await self._given._ensure_open()
        async for key in self._given.list_prefix(self._key(prefix)):
            yield key.removeprefix(self._prefix).lstrip("/")

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names in what would be a folder."""
        await self._given._ensure_open()
        async for key in self._given.list_dir(self._key(prefix)):
            yield key

    async def set(self, key: str, value: Buffer) -> None:
        """Not allowed."""
        raise PermissionError(f"{self.location} is only read")

    async def delete(self, key: str) -> None:
        """Not allowed."""
        raise PermissionError(f"{self.location} is only read")
