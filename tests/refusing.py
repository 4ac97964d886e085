"""Has operations of the file system fail within a folder, as file systems of every kind do: see `test_file_systems`."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oocattn.storage.files import renaming

CALLS: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((os, "open"), (io, "open"), (builtins, "open")),
    "look": ((os, "stat"), (os, "lstat"), (os, "fstat")),
    "list": ((os, "listdir"), (os, "scandir")),
    "make a folder": ((os, "mkdir"),),
    "rename": ((os, "rename"), (os, "replace")),
    "rename to a new name": ((renaming, "_rename_no_replace"),),
    "link": ((os, "link"),),
    "remove": ((os, "unlink"), (os, "rmdir")),
    "read": ((os, "pread"), (os, "preadv")),
    "write": ((os, "pwrite"),),
    "extend": ((os, "ftruncate"),),
    "sync": ((os, "fsync"), (os, "fdatasync")),
    "advise": ((os, "posix_fadvise"),),
    "touch": ((os, "utime"),),
    "lock": ((fcntl, "flock"),),
    "map": ((mmap, "mmap"),),
}
"""Operations by name, and the functions that do them."""


def place_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The path that a call is about."""
    target = arguments[0] if arguments else ""
    if isinstance(target, int):
        try:
            return os.readlink(f"/proc/self/fd/{target}")
        except OSError:
            return ""
    place = os.fspath(target) if isinstance(target, str | bytes | os.PathLike) else ""
    place = place.decode() if isinstance(place, bytes) else place
    folder = options.get("dir_fd", options.get("src_dir_fd"))
    return f"{os.readlink(f'/proc/self/fd/{folder}')}/{place}" if isinstance(folder, int) else place


@contextmanager
def refusing(folder: Path, operation: str, number: int, after: int = 0, times: int = 1 << 30) -> Iterator[list[str]]:
    """Have the calls of an operation within a folder fail, from the one `after` so many on and so many times.

    Gives the paths of all such calls, as they come.
    """
    seen: list[str] = []

    def refused(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            place = place_of(arguments, options)
            if place.startswith(str(folder)):
                seen.append(place)
                if after < len(seen) <= after + times:
                    raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    before = [(module, name, getattr(module, name)) for module, name in CALLS[operation]]
    for module, name, real in before:
        setattr(module, name, refused(real))
    try:
        yield seen
    finally:
        for module, name, real in before:
            setattr(module, name, real)


ANSWERS: dict[str, tuple[int, ...]] = {
    "open": (
        errno.EACCES,
        errno.EMFILE,
        errno.EIO,
        errno.ESTALE,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ETXTBSY,
    ),
    "look": (errno.EIO, errno.ESTALE, errno.EACCES),
    "list": (errno.EIO, errno.EACCES),
    "make a folder": (errno.EROFS, errno.EDQUOT, errno.EACCES),
    "rename": (errno.EIO, errno.EXDEV, errno.EPERM),
    "rename to a new name": (errno.EINVAL, errno.ENOSYS, errno.EIO),
    "link": (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK),
    "remove": (errno.EIO, errno.EBUSY, errno.EPERM),
    "read": (errno.EIO, errno.ESTALE, errno.EINVAL),
    "write": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "extend": (errno.EINVAL, errno.EPERM, errno.EIO),
    "sync": (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, errno.ENOSPC),
    "advise": (errno.ESPIPE, errno.EINVAL, errno.ENOSYS),
    "touch": (errno.EPERM, errno.ENOSYS),
    "lock": (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
    "map": (errno.ENODEV, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOMEM),
}
"""What each of them may answer."""
