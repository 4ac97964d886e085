"""Reading files that may be anything: only regular ones, without waiting, and no more of them than is allowed.

A FIFO, a device or a folder may stand where a file should, and a file may be of any size. Nothing here writes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oocattn.errors import IntegrityError


@contextmanager
def opened(path: str | Path, *, follow: bool = True, folder: int | None = None, writable: bool = False) -> Iterator[int]:
    """A descriptor of a regular file, open for reading, and for writing where it is to be `writable`.

    `path` is relative to the open `folder`, if one is given.

    With `follow=False` the last component may not be a symbolic link. Raises FileNotFoundError where nothing is there,
    IntegrityError where something other than a regular file is, and OSError as the system does.
    """
    flags = (
        (os.O_RDWR if writable else os.O_RDONLY)
        | os.O_CLOEXEC
        | os.O_NONBLOCK
        | os.O_NOCTTY
        | (0 if follow else os.O_NOFOLLOW)
    )
    if not follow and stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode):
        raise IntegrityError(f"{path} is a symbolic link: expected a file, and links are not followed here; remove it")
    try:
        descriptor = os.open(path, flags, dir_fd=folder)
    except IsADirectoryError:
        raise IntegrityError(f"{path} is a folder: expected a file; remove it") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise IntegrityError(f"{path} is no regular file: expected one; remove it")
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(path: str | Path, most: int, *, follow: bool = True, folder: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `opened`, and IntegrityError for a larger one."""
    with opened(path, follow=follow, folder=folder) as descriptor, open(descriptor, "rb", closefd=False) as file:
        content = file.read(min(os.fstat(descriptor).st_size, most) + 1)  # so much memory is taken at once
    if len(content) > most:
        raise IntegrityError(f"{path} has more than {most:,} bytes: no such file is that large; it is damaged or foreign")
    return content
