"""Remote stores: Zarr's store over fsspec, with retries. An object is missing only where its server says so."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar, cast

from zarr.storage import FsspecStore

from oocattn.errors import ProblemError, RemoteError
from oocattn.storage.locations import Location, is_chain
from oocattn.storage.remote.limits import current_limit
from oocattn.storage.remote.options import StorageOptions, by_protocol, secrets_in, secrets_of
from oocattn.storage.remote.transient import retry, status_of
from oocattn.storage.zarr_compat import Buffer, BufferPrototype, ByteRequest, sync
from oocattn.threads import begin_call

LISTING_PATIENCE = 5.0  # seconds for which a listing is tried again: what cannot be listed is asked for by name
CONNECTIONS = 100
"""To one server at a time, at most: as many as aiohttp has over http."""

UPLOAD_BYTES = 8 << 20
"""Of a file, in memory at a time: S3 takes parts of 5 MiB or more."""

T = TypeVar("T")


async def all_of(steps: Iterable[Awaitable[T]]) -> list[T]:
    """Await steps at the same time; return what each returns. An error is raised when all have ended: none goes on."""
    found = []
    for each in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(each, BaseException):
            raise each
        found.append(each)
    return found


class NoConditionalPutError(ProblemError):
    """A store cannot create an object only where there is none."""


class RemoteStore(FsspecStore):
    """A store that retries requests for a minute after transient failures.

    Its methods raise RemoteDeniedError where a server does not let an object be read, else RemoteError.
    """

    location = ""
    """What messages call the store."""

    secrets: tuple[str, ...] = ()
    """What no message shows."""

    received = 0.0
    """When the last bytes of an object came, by `time.perf_counter`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limit = current_limit()

    @classmethod
    def of_files(cls, files: Any, path: str, url: str, **options: Any) -> RemoteStore:
        """The store at a path of an open file system, which has this URL. No message shows a value of its options."""
        found = cls(files, path=path, **options)
        found.location = str(Location(url, None))
        found.secrets = secrets_of(getattr(unwrapped_files(files), "storage_options", None))
        return found

    def _path_of(self, key: str) -> str:
        """What the file system calls a key."""
        root = self.path.rstrip("/")
        return f"{root}/{key}" if root else key

    async def _retry(self, operation: str, key: str, step: Callable[[], Awaitable[T]], **options: float) -> T:
        url, of_call = f"{self.location}/{key}", {"secrets": self.secrets, "limit": self._limit}
        return await retry(operation, url, step, **of_call, **options)  # type: ignore[arg-type]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of `key`, or the part of it in `byte_range`; None if there is none."""
        get = super().get
        try:
            found = await self._retry("reading", key, lambda: get(key, prototype, byte_range))
        except FileNotFoundError:
            return None
        self.received = time.perf_counter()
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several (key, range), in order; None where one is missing."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether the server has an object of that key."""
        try:
            await self.find_size(key)
        except FileNotFoundError:
            return False
        return True

    async def find_size(self, key: str) -> int | None:
        """Bytes of an object; None where its server does not tell. Raises FileNotFoundError where there is none."""
        path = self._path_of(key)

        async def step() -> int | None:
            found = await self.fs._info(path)
            if found.get("type") == "directory":
                raise IsADirectoryError(path)
            size: int | None = found.get("size")
            return size

        return await self._retry("looking for", key, step)

    async def find_sizes(self, keys: Iterable[str]) -> dict[str, int | None]:
        """The sizes of the objects that exist, asked for at the same time."""

        async def find(key: str) -> list[tuple[str, int | None]]:
            try:
                return [(key, await self.find_size(key))]
            except FileNotFoundError:
                return []

        return dict(itertools.chain.from_iterable(await all_of(map(find, keys))))

    async def list_sizes(self, prefix: str) -> dict[str, int | None]:
        """The sizes of all objects below `prefix`, by key. None where the store cannot be listed, or does not allow it."""
        return {key: found.get("size") for key, found in (await self._list(prefix)).items()}

    async def list_versions(self, prefix: str) -> dict[str, str]:
        """What tells the content of objects below `prefix` from others: an entity tag, or a time; as `list_sizes`."""
        return {key: _version(found) for key, found in (await self._list(prefix)).items()}

    async def _list(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """What the file system tells of all objects below `prefix`, by key."""
        path = self._path_of(prefix)

        async def step() -> dict[str, Any]:
            if not self.supports_listing:
                return {}
            self.fs.invalidate_cache(path)
            return await self._find(path)

        try:
            found = await self._retry("listing", prefix, step, patience=LISTING_PATIENCE)
        except (FileNotFoundError, RemoteError):
            return {}
        root = self.path.rstrip("/")
        return {name.removeprefix(f"{root}/"): told for name, told in found.items()}

    async def getsize(self, key: str) -> int:
        """Bytes of an object, which is read where its server does not tell. Raises FileNotFoundError."""
        size = await self.find_size(key)
        if size is not None:
            return int(size)
        getsize = super().getsize
        return await self._retry("reading", key, lambda: getsize(key))

    async def _find(self, path: str) -> dict[str, Any]:
        """What the file system tells of all objects below a path. s3fs asks twice more whether an empty one is an object."""
        parent, _, name = path.rstrip("/").rpartition("/")
        where = {"path": parent, "prefix": f"{name}/"} if self._is_s3 and parent else {"path": path}
        found: dict[str, Any] = await self.fs._find(detail=True, withdirs=False, **where)
        return found

    @property
    def _is_s3(self) -> bool:
        protocol = unwrapped_files(self.fs).protocol
        return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The keys that begin so."""
        for key in await self._list_keys(prefix, self._list_all if not prefix and self._is_s3 else super().list_prefix):
            yield key

    async def _list_all(self, _: str) -> AsyncIterator[str]:
        root = self.path.rstrip("/")
        for path in await self._find(root):
            yield path.removeprefix(f"{root}/")

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names in what would be a folder."""
        for name in await self._list_keys(prefix, super().list_dir):
            yield name

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in await self._list_keys("", lambda _: super(RemoteStore, self).list()):
            yield key

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write a whole object: to do it again changes nothing."""
        write = super().set
        await self._retry("writing", key, lambda: write(key, value, byte_range))

    async def put(self, key: str, content: bytes | bytearray) -> None:
        """Write a whole object of bytes that are not copied."""
        path = self._path_of(key)
        await self._retry("writing", key, lambda: self.fs._pipe_file(path, content))

    async def upload(self, key: str, path: Path) -> None:
        """Write a file as a whole object, `UPLOAD_BYTES` at a time."""
        place, write = self._path_of(key), self.fs._put_file
        options = {"chunksize": UPLOAD_BYTES} if "chunksize" in inspect.signature(write).parameters else {}
        await self._retry("writing", key, lambda: write(str(path), place, **options))

    async def download(self, key: str, path: Path) -> None:
        """Write an object into a file, a part at a time. Raises FileNotFoundError."""
        place = self._path_of(key)
        await self._retry("reading", key, lambda: self.fs._get_file(place, str(path)))

    async def create(self, key: str, content: bytes | bytearray) -> bool:
        """Write a whole object unless there is one, by a conditional request; return whether it was written.

        False also where an earlier try wrote it, whose answer was lost. Raises NoConditionalPutError where the file system
        or its server says that it knows no such request.
        """
        path = self._path_of(key)

        async def step() -> bool:
            try:
                await self.fs._pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except Exception as error:  # each file system has its own
                if isinstance(error, NotImplementedError | TypeError) or status_of(error) == HTTPStatus.NOT_IMPLEMENTED:
                    raise NoConditionalPutError(f"{self.location}: {error}") from error
                raise
            return True

        return await self._retry("writing", key, step)

    async def remove(self, key: str, content: bytes | None = None) -> None:
        """Remove one object; with `content`, at each try only while it has that, for an earlier one may have removed it.

        Raises FileNotFoundError as some servers do where there is none.
        """
        path = self._path_of(key)

        async def step() -> None:
            if content is None or await self.fs._cat_file(path) == content:
                await self.fs._rm_file(path)

        await self._retry("removing", key, step)

    async def _list_keys(self, prefix: str, source: Callable[[str], AsyncIterator[str]]) -> Any:
        async def step() -> Any:
            return [key async for key in source(prefix)]

        return await self._retry("listing", prefix, step, patience=LISTING_PATIENCE)


def _version(told: Mapping[str, Any]) -> str:
    """The entity tag of an object, or else its time, of what a file system tells; "" without."""
    lower = {str(name).lower().replace("_", ""): value for name, value in told.items()}
    tag = next((lower[name] for name in ("etag", "md5hash", "lastmodified", "mtime", "created") if lower.get(name)), "")
    return f"{told.get('size')} {tag}"


def unwrapped_files(files: Any) -> Any:
    """A file system of fsspec, or the one in it that it makes asynchronous."""
    return getattr(files, "sync_fs", files)


def open_remote(location: Location, storage_options: StorageOptions | None = None, *, read_only: bool = True) -> RemoteStore:
    """The store at a URL, or at a chain of them, that was checked. No message shows a value of the options.

    Raises ProblemError where a package is missing, FileNotFoundError where an archive is, and RemoteError as `retry`.
    """

    async def step() -> RemoteStore:
        return await asyncio.wrap_future(begin_call(_open, location.text, options, read_only))  # an archive is read

    options, limit = by_protocol(location.text, storage_options), current_limit()
    secrets = (*secrets_of(storage_options), *secrets_in(location.text))
    store = sync(retry("opening", str(location), step, secrets=secrets, limit=limit))
    store.location, store.secrets, store._limit = str(location), secrets, limit
    return store


def _with_connections(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of s3fs with as many connections as reads need that are under way together; it has 10 by itself."""
    return {**options, "config_kwargs": {"max_pool_connections": CONNECTIONS, **options.get("config_kwargs", {})}}


def _open(url: str, options: dict[str, Any], read_only: bool) -> RemoteStore:
    chained = is_chain(url)
    scheme = (url.rpartition("::")[2] if chained else url).partition("://")[0]
    try:
        if scheme == "s3":
            options = {**options, scheme: _with_connections(options.get(scheme, {}))}
        if scheme not in ("http", "https"):
            return cast(RemoteStore, RemoteStore.from_url(url, options, read_only=read_only))
        from oocattn.storage.remote.http_files import HttpFiles, get_client

        own = {**options.get(scheme, {}), "get_client": get_client}
        if chained:
            options = {**options, scheme: own}
            return cast(RemoteStore, RemoteStore.from_url(url, options, read_only=read_only))
        store = RemoteStore(HttpFiles(**{**own, "asynchronous": True}), read_only=read_only, path=url)
        store.supports_listing = False  # a page with links is no list of what is there
        return store
    except ImportError as error:
        raise ProblemError(f"{url} cannot be opened ({error}): install that package, and oocattn[remote]") from error
