"""Objects of a Zarr store, read and written whole, from any thread: what a run keeps in a store goes through here.

Every request is retried as reads are (`transient`), and names store and key where it fails. An object is whole or not there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from oocattn.errors import IntegrityError, ProblemError
from oocattn.storage.bounded import read_start
from oocattn.storage.nodes import MOST_BYTES
from oocattn.storage.remote.store import NoConditionalPutError, RemoteStore, all_of
from oocattn.storage.remote.transient import retry
from oocattn.storage.zarr_compat import Store, buffer_prototype, sync

T = TypeVar("T")

Content = bytes | bytearray

TOGETHER = 32
"""Requests that are under way at a time, at most."""


class Objects:
    """The objects of a store below a path, which messages call `name`."""

    def __init__(self, store: Store, name: str, path: str = "") -> None:
        self.store = store
        self.name = name
        self._below = f"{path}/" if path else ""

    def __str__(self) -> str:
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self.store, RemoteStore):  # a copy would take what is written
            raise TypeError(f"{self.name} is a store of this process: it cannot be sent to another")
        return self.__dict__

    def read(self, key: str, most: int = MOST_BYTES) -> bytes | None:
        """The content of an object of at most `most` bytes; None where there is none. Raises IntegrityError for a larger."""
        found = self.read_start(key, most + 1)
        if found is not None and len(found) > most:
            raise IntegrityError(f"{self.name}/{key} has more than {most:,} bytes: it is damaged or foreign; remove it")
        return found

    def read_start(self, key: str, nbytes: int) -> bytes | None:
        """The first bytes of an object; None where there is none."""
        return self.read_starts({key: nbytes})[key]

    def read_starts(self, nbytes: Mapping[str, int]) -> dict[str, bytes | None]:
        """The first bytes of objects, so many of each, which are asked for at the same time."""

        def read(key: str, most: int) -> Awaitable[bytes | None]:
            return self._ask("reading", key, lambda place: read_start(self.store, place, most))

        return dict(zip(nbytes, sync(all_of(read(*each) for each in nbytes.items())), strict=True))

    def find_size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        with suppress(FileNotFoundError):
            return self._request("looking for", key, self.store.getsize)
        return None

    def list(self) -> list[str]:
        """The keys of all objects, as the store has them now."""

        async def step(place: str) -> list[str]:
            if isinstance(self.store, RemoteStore):
                self.store.fs.invalidate_cache()  # of listings that others have changed meanwhile
                return [key async for key in self.store.list_prefix("")]
            return [key.removeprefix(place) async for key in self.store.list() if key.startswith(place)]

        with suppress(FileNotFoundError):
            return sorted(self._request("listing", "", step))
        return []

    def list_sizes(self) -> dict[str, int | None] | None:
        """The bytes of all objects, as the store has them now; None where it does not tell them together."""
        if not isinstance(self.store, RemoteStore):
            return None
        self.store.fs.invalidate_cache()
        found = sync(self.store.list_sizes(""))
        return None if not found or None in found.values() else found

    def write(self, key: str, content: Content) -> None:
        """Write an object, in place of one that is there. Raises ProblemError where there is no such bucket."""
        self.write_each({key: content})

    def write_each(self, contents: Mapping[str, Content]) -> None:
        """Write a few objects, which are small together, at the same time; as `write`."""

        async def write(key: str, content: Content) -> None:
            store = self.store
            if isinstance(store, RemoteStore):
                await store.put(key, content)
            else:
                value = buffer_prototype.buffer.from_bytes(bytes(content))
                await self._ask("writing", key, lambda place: store.set(place, value))

        try:
            sync(all_of(write(*each) for each in contents.items()))
        except FileNotFoundError as error:
            raise self._no_bucket_error() from error

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object, a part at a time."""
        store = self.store
        if not isinstance(store, RemoteStore):
            raise TypeError(f"{self.name} is no remote store")
        try:
            sync(store.upload(key, path))
        except FileNotFoundError as error:
            raise self._no_bucket_error() from error

    def download(self, key: str, path: Path) -> None:
        """Write an object into a file, which is empty where there is no such object."""
        if not isinstance(self.store, RemoteStore):
            raise TypeError(f"{self.name} is no remote store")
        path.write_bytes(b"")
        with suppress(FileNotFoundError):
            sync(self.store.download(key, path))

    def create(self, key: str, content: Content) -> bool:
        """Write an object unless there is one, in one step of the server; return whether it was written.

        False may also be said of the caller's own object: a request whose answer was lost is made again. Raises
        NoConditionalPutError where the store has no such step. That a server disregards the condition is not told.
        """
        if not isinstance(self.store, RemoteStore):
            raise NoConditionalPutError(f"{self.name}: this kind of store has no conditional put")
        try:
            return sync(self.store.create(key, content))
        except FileNotFoundError as error:
            raise self._no_bucket_error() from error

    def remove(self, key: str, content: bytes | None = None) -> None:
        """Remove an object, if it is there; with `content`, of a remote store, only while it has that."""
        sync(self._remove(key, content))

    def remove_each(self, keys: Iterable[str]) -> None:
        """Remove objects, those that are there, some at the same time."""
        left = list(keys)
        for first in range(0, len(left), TOGETHER):
            sync(all_of(map(self._remove, left[first : first + TOGETHER])))

    async def _remove(self, key: str, content: bytes | None = None) -> None:
        store = self.store
        with suppress(FileNotFoundError):
            if isinstance(store, RemoteStore):
                await store.remove(key, content)
            else:
                await self._ask("removing", key, store.delete)

    def _request(self, operation: str, key: str, step: Callable[[str], Awaitable[T]]) -> T:
        return sync(self._ask(operation, key, step))

    async def _ask(self, operation: str, key: str, step: Callable[[str], Awaitable[T]]) -> T:
        place = self._below + key
        if isinstance(self.store, RemoteStore):  # which retries by itself
            return await step(place)

        async def named() -> T:
            try:
                return await step(place)
            except KeyError as error:  # Icechunk's, of a node that is not there
                raise FileNotFoundError(place) from error

        return await retry(operation, f"{self.name}/{key}", named)

    def _no_bucket_error(self) -> ProblemError:
        return ProblemError(f"{self.name}: there is no such bucket or folder: make it, or choose another place")
