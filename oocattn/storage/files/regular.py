"""Bounded reading of regular files, and of nothing else.

A FIFO, a device or a folder may stand where a file should, and a file may be of any size. What cannot be mapped is read:
file systems in user space refuse maps (ENODEV), limits do (ENOMEM, EMFILE), and a file may have become shorter.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from oocattn.errors import IntegrityError
from oocattn.storage.files.operations import name_failure


@contextmanager
def open_regular(path: str | Path, *, follow: bool = True, writable: bool = False) -> Iterator[int]:
    """Open a regular file to read, or also to write; yield its descriptor.

    With `follow=False` the last component may not be a symbolic link. Raises FileNotFoundError where nothing is there,
    IntegrityError where something other than a regular file is, and OSError as the system does, which names the path.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    flags = access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    with name_failure("open", path):
        if not follow and stat.S_ISLNK(os.lstat(path).st_mode):
            raise IntegrityError(f"{path} is a symbolic link: expected a file, and links are not followed here; remove it")
        try:
            descriptor = os.open(path, flags)
        except IsADirectoryError:
            raise IntegrityError(f"{path} is a folder: expected a file; remove it") from None
    try:
        with name_failure("look at", path):
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not regular:
            raise IntegrityError(f"{path} is no regular file: expected one; remove it")
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(path: str | Path, most: int, *, follow: bool = True) -> bytes:
    """Read a regular file of at most `most` bytes. Raises as `open_regular`, and IntegrityError for a larger one."""
    with open_regular(path, follow=follow) as descriptor, name_failure("read", path):
        size = os.fstat(descriptor).st_size
        content = read_exactly(descriptor, min(size, most) + 1, 0, path)  # so much memory is taken at once
        if size < len(content) <= most:  # a file system that does not know how long it is
            content += read_exactly(descriptor, most + 1 - len(content), len(content), path)
    if len(content) > most:
        raise IntegrityError(f"{path} has more than {most:,} bytes: no such file is that large; it is damaged or foreign")
    return content


def read_exactly(descriptor: int, nbytes: int, offset: int, path: str | Path) -> bytes:
    """Read `nbytes` of an open file from `offset` on, fewer only at its end. `path` is for errors."""
    pieces: list[bytes] = []
    with name_failure("read", path):
        while nbytes > 0 and (piece := os.pread(descriptor, nbytes, offset)):
            pieces.append(piece)
            nbytes, offset = nbytes - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
    """Tell the system how a file will be read, where it takes advice."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, length, advice)


def map_file(descriptor: int, length: int, offset: int = 0) -> mmap.mmap | None:
    """Map `length` bytes from `offset`, a multiple of a page, read-only; None where that fails."""
    try:
        return mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=offset)
    except (OSError, ValueError):
        return None
