"""A local Zarr store whose reads are views of memory-mapped files.

Zarr decodes uncompressed chunks without a copy, so over this store `array.get_basic_selection(..., out=...)` copies
once. A view stays valid while its file is replaced by renaming or removed; one that is *truncated in place* under a
live view kills the process (SIGBUS). Zarr, TensorStore and this package replace files.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from zarr.storage import LocalStore

from oocattn.errors import IntegrityError
from oocattn.storage.files.regular import map_file, open_regular, read_exactly
from oocattn.storage.zarr_compat import (
    Buffer,
    BufferPrototype,
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    SuffixByteRequest,
    default_buffer_prototype,
)
from oocattn.threads import begin_call

# Python's mmap keeps a file descriptor, and one read of a shard asks for thousands of ranges of one file: they share
# its map while any of them lives. A live map holds its inode, so the number cannot come to mean another file; where a file
# system has no numbers, path and times tell files apart.
_live_maps: WeakValueDictionary[tuple[object, ...], mmap.mmap] = WeakValueDictionary()


def _content(path: Path, window: slice) -> bytes | memoryview:
    """A window of a regular file, mapped read-only, or else read. Raises as `open_regular` does."""
    with open_regular(path) as descriptor:
        status = os.fstat(descriptor)
        if status.st_size == 0:  # cannot be mapped
            return b""
        identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        mapped = _live_maps.get(identity) or map_file(descriptor, status.st_size)
        if mapped is None:
            start, stop, _ = window.indices(status.st_size)
            return read_exactly(descriptor, stop - start, start, path)
        _live_maps[identity] = mapped
        return memoryview(mapped)[window]


def _window(byte_range: ByteRequest | None) -> slice:
    match byte_range:
        case None:
            return slice(None)
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(-suffix, None) if suffix else slice(0)
    raise TypeError(f"Unexpected byte_range, got {byte_range}.")


class MappedStore(LocalStore):
    """A `zarr.storage.LocalStore` whose reads return read-only views of files. What cannot be mapped is read."""

    def can_map(self, path: str) -> bool:
        """Whether files are mapped and not read, by the metadata of a node."""
        for name in ("zarr.json", ".zarray", ".zgroup"):
            with suppress(OSError, IntegrityError), open_regular(self.root / path / name) as descriptor:
                mapped = map_file(descriptor, os.fstat(descriptor).st_size)
                if mapped is not None:
                    mapped.close()
                return mapped is not None
        return False

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of `key`, or a part of it; None if there is none, or a folder. Raises as `open_regular`."""
        self._ensure_open_sync()
        window, path = _window(byte_range), self.root / key
        try:
            if path.is_dir():
                return None
            content = _content(path, window)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of `key`, or the part of it in `byte_range`; None if there is none."""
        return await asyncio.wrap_future(begin_call(self.get_sync, key, prototype=prototype, byte_range=byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several (key, range), in order; None where one is missing."""
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    def __repr__(self) -> str:
        return f"MappedStore('{self}')"
