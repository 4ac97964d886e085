"""Files that are whole or not there, whatever happens: written under a temporary name, synced, renamed, their folder synced.

Everything that a run may need again goes through here: chunks, partials, the journal. A failure takes the temporary file
with it; a kill leaves `*.partial`, as zarr's own writes do, and nobody reads it: `remove_leftovers` clears it away.
"""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import mmap
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError

PARTIAL = ".partial"
"""How the names of files end that are not whole."""


def write_durably(path: Path, content: Iterable[NDArray[Any]], size: int | None = None) -> int:
    """Write C-contiguous arrays one after another as the file `path`, in place of any; return the bytes written.

    The file is extended by zeros to `size` bytes, if given. When this returns, it is on disk. Raises OSError as the file
    system does, and then what was at `path` is still there.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    written = 0
    try:
        with open(temporary, "xb", buffering=0) as file:
            for array in content:
                _write(file, array.reshape(-1).view(np.uint8), written)
                written += array.nbytes
            if size is not None:
                file.truncate(size)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return written


def _write(file: io.FileIO, content: NDArray[np.uint8], offset: int) -> None:
    """Write bytes at `offset`: directly where they are whole pages in memory and the file system can, as fast again.

    Measured on a local disk, up to fsync: 1.6 to 2.3 GB/s directly, 0.9 to 1.25 GB/s through the page cache.
    """
    descriptor, written = file.fileno(), 0
    whole_pages = not any(number % mmap.PAGESIZE for number in (content.ctypes.data, content.nbytes, offset))
    if whole_pages and hasattr(os, "O_DIRECT"):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        with suppress(OSError):  # not every file system can
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            written = os.pwrite(descriptor, content.data, offset)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    while written < content.nbytes:
        written += os.pwrite(descriptor, content.data[written:], offset + written)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durably(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that their entries are on disk; it may be there."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room for more on a file system, or for its user."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that were killed left in a folder and those in it."""
    for leftover in folder.rglob(f"*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text durably."""
    write_durably(path, [np.frombuffer(text.encode(), np.uint8)])


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object and its checksum durably."""
    write_text(path, encode_record(record).decode())


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object that `write_record` wrote. Raises IntegrityError for anything else, FileNotFoundError for nothing."""
    return decode_record(path.read_bytes(), path)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A JSON object as one line that begins with its checksum."""
    text = json.dumps(record, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode_record(line: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a line. Raises IntegrityError, naming the file, where it does not match its checksum."""
    checksum, _, text = line.rstrip().partition(b" ")
    with suppress(ValueError):
        record = json.loads(text)
        if isinstance(record, dict) and checksum == b"%08x" % zlib.crc32(text):
            return record
    raise IntegrityError(f"{path}: the record is damaged: it does not match its checksum")
