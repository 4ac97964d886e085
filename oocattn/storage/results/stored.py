"""A result that lies in no folder: at a URL, or in a Zarr store of the caller's.

It grows in place: each chunk is one object under its final name. Nobody sees a group until the run is complete, for its
metadata is written last. Beside a result at a URL, in `RESULT.oocattn/`, are its lock, the mark of the run that it grows by,
and in the end report and certificate. A store of the caller's holds the result alone: it may be one that takes no other
objects, as Icechunk's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from zarr.storage import FsspecStore

from oocattn.errors import ProblemError, RemoteDeniedError
from oocattn.storage.locations import Location, describe, parse_location
from oocattn.storage.nodes import MOST_BYTES, read_attributes
from oocattn.storage.remote.objects import Objects
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.remote.store import RemoteStore, open_remote, unwrapped_files
from oocattn.storage.zarr_compat import Store, StorePath

NODES = ("zarr.json", ".zgroup", ".zarray")
"""The objects by which something of Zarr's is told at the root of a store."""

_numbers = itertools.count()
_live: WeakValueDictionary[tuple[int, int], StoredResult] = WeakValueDictionary()


class StoredResult:
    """A result in a store that messages call `name`. It can be sent to workers, unless its store is this process's own."""

    def __init__(self, store: Store, name: str, path: str = "") -> None:
        self.store = store
        self.path = path
        self._name = name
        self._token = (os.getpid(), next(_numbers))
        _live[self._token] = self

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.store, RemoteStore):
            return StoredResult, (self.store, self._name)
        return _of_this_process, (self._token, str(self))

    def __str__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredResult) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    @property
    def _place(self) -> tuple[Any, str]:
        return (str(self) if isinstance(self.store, RemoteStore) else id(self.store)), self.path

    @property
    def name(self) -> str:
        """The last part of its URL or path; "" where it has none."""
        place = str(self) if isinstance(self.store, RemoteStore) else self.path
        return place.rstrip("/").rpartition("/")[2]

    @cached_property
    def objects(self) -> Objects:
        """The objects of the group."""
        return Objects(self.store, str(self), self.path)

    @cached_property
    def beside(self) -> Objects | None:
        """The objects beside the group; None where the store holds the result alone."""
        return self._objects_at(".oocattn")

    @cached_property
    def scratch(self) -> Objects | None:
        """The objects of job state beside the group, where it is kept in the store."""
        return self._objects_at(".oocattn/scratch")

    def _objects_at(self, suffix: str) -> Objects | None:
        if not isinstance(self.store, RemoteStore):
            return None
        found = RemoteStore(self.store.fs, read_only=False, path=self.store.path.rstrip("/") + suffix)
        found.location, found.secrets = f"{self}{suffix}", self.store.secrets
        return Objects(found, found.location)

    @property
    def is_of_this_process(self) -> bool:
        """Whether no other process can write there."""
        return not isinstance(self.store, RemoteStore)

    @property
    def needs_arrays_first(self) -> bool:
        """Whether the store takes no chunk of an array that it does not know."""
        return self.beside is None

    def check_writable(self) -> None:
        """Raise ProblemError where a result cannot grow."""
        store = self.store
        if store.read_only:
            raise ProblemError(f"result: {self} is read-only: open it for writing")
        if not (store.supports_writes and store.supports_deletes and store.supports_listing):
            raise ProblemError(
                f"result: {self} cannot replace, remove or list what is in it: expected a store that can; give a path or a "
                "URL"
            )

    def read(self, key: str) -> bytes | None:
        """The content of an object of the group; None where there is none."""
        return self.objects.read(key)

    def is_taken(self) -> bool:
        """Whether a group or an array is there."""
        return any(found is not None for found in self._read_nodes().values())

    def attributes(self) -> dict[str, Any] | None:
        """The attributes of the group; none of an array, None where nothing is. Raises IntegrityError for a damaged one."""
        nodes = self._read_nodes()
        if all(found is None for found in nodes.values()):
            return None
        return read_attributes(lambda key: nodes[key] if key in nodes else self.read(key), str(self))

    def _read_nodes(self) -> Mapping[str, bytes | None]:
        """What is at the keys of `NODES`, which are asked for at the same time."""
        try:
            return self.objects.read_starts(dict.fromkeys(NODES, MOST_BYTES + 1))
        except RemoteDeniedError:  # also the answer for a missing object, where listing is not allowed
            found = self.read(NODES[0])
            if found is None:
                raise
            return {**dict.fromkeys(NODES), NODES[0]: found}

    def above(self) -> Iterator[StoredResult]:
        """The places that this one lies in, the nearest first; the first part of a remote path is its bucket."""
        *parts, _ = (self.store.path if isinstance(self.store, RemoteStore) else self.path).strip("/").split("/")
        for count in range(len(parts), 0, -1):
            path = "/".join(parts[:count])
            if not isinstance(self.store, RemoteStore):
                yield StoredResult(self.store, f"{self.store} at {path}", path)
            elif count > 1:
                name = str(self).rsplit("/", len(parts) + 1 - count)[0]
                store = RemoteStore(self.store.fs, read_only=True, path=path)
                store.location, store.secrets = name, self.store.secrets
                yield StoredResult(store, name)

    def overlaps(self, location: str) -> bool:
        """Whether the place of that name lies in this one or in what is beside it, or holds it."""
        theirs = location.rstrip("/") + "/"
        ours = f"{self}".rstrip("/")
        return any(f"{each}/".startswith(theirs) or theirs.startswith(f"{each}/") for each in (ours, f"{ours}.oocattn"))


def _of_this_process(token: tuple[int, int], name: str) -> StoredResult:
    found = _live.get(token)
    if found is None:
        raise ProblemError(
            f"result: {name} is an object of process {token[0]}, and this is process {os.getpid()}: workers of a cluster "
            "write to URLs; give a URL, or run without client="
        )
    return found


def stored_result(typed: object, options: StorageOptions | None) -> StoredResult:
    """The result at a URL, or in a Zarr store. Raises ProblemError for a place that cannot be written to."""
    if isinstance(typed, Store | StorePath):
        return _in_store(typed)
    return _at_url(parse_location(typed, "result"), options)


def _at_url(location: Location, options: StorageOptions | None) -> StoredResult:
    text, scheme = location.text.rstrip("/"), location.text.partition("://")[0]
    if "::" in location.text or scheme in ("http", "https"):
        raise ProblemError(
            f"result {location}: archives and web servers are read, not written to: expected a local path, or a URL that "
            "begins with s3://, gs://, az://, abfs:// or memory://"
        )
    path = text.partition("://")[2].lstrip("/")
    if not path or (scheme != "memory" and "/" not in path):
        raise ProblemError(f"result {location}: expected a name after the bucket, for the Zarr group; add one")
    store = open_remote(Location(text, None), options, read_only=False)
    return StoredResult(store, str(location).rstrip("/"))


def _in_store(given: Store | StorePath) -> StoredResult:
    path = given.path if isinstance(given, StorePath) else ""
    store = given.store if isinstance(given, StorePath) else given
    if isinstance(store, RemoteStore) and not path:  # of a result that is open
        return StoredResult(RemoteStore.of_files(store.fs, store.path, store.location, read_only=False), store.location)
    if isinstance(store, FsspecStore):
        root = "/".join(part for part in (store.path.rstrip("/"), path) if part)
        protocol = unwrapped_files(store.fs).protocol
        scheme = protocol if isinstance(protocol, str) else protocol[0]
        url = f"{scheme}://{root if scheme in ('file', 'local', 'dir') else root.lstrip('/')}"
        remote = RemoteStore.of_files(store.fs, root, url, read_only=store.read_only)
        return StoredResult(remote, remote.location)
    return StoredResult(store, f"{describe(store)}{f' at {path}' if path else ''}", path)
