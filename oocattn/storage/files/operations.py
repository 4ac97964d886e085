"""Errors of the file system: operation, path, reason and remedy.

An error keeps its number and its class (FileNotFoundError and so on), and gets the words that the system's own lacks.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from oocattn.errors import IntegrityError
from oocattn.naming import named
from oocattn.text import printable

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
"""What a file system answers that does not have an operation."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What it answers where there is no room for more: on it, or for its user."""

LOST = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""What it answers where it has lost what it should read, or finds that damaged itself."""

_GONE = "its file system is away: mount it again, and try again"

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "the quota of its user is used up: make room",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose a file system that has larger ones",
    errno.EROFS: "it is mounted read-only: choose another path",
    errno.EACCES: "check the permissions of it and of the folders above it",
    errno.EPERM: "check who owns it, and whether its file system allows that",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is, or leads through, symbolic links that are not followed: name the place itself",
    errno.EXDEV: "the two places are on different file systems: choose a path where they are on one",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the system has too many open files: close others",
    errno.ENOMEM: "close other programs, or raise the limit on address space (ulimit -v)",
    errno.EIO: "the disk or its connection failed: see the system's log (dmesg)",
    errno.ESTALE: "it was replaced or removed on its server: mount it again, and try again",
    errno.ENOTCONN: _GONE,
    errno.ETIMEDOUT: _GONE,
    errno.EHOSTDOWN: _GONE,
    errno.ETXTBSY: "a program runs from it: end that, or choose another path",
    errno.EBUSY: "another process uses it: end that, and try again",
}
"""What to do about an error, by its number."""

_MARK = "cannot "

_said: set[tuple[int, str]] = set()  # what was said by `warn_once`

_saying = threading.Lock()

logger = logging.getLogger("oocattn")


@contextmanager
def name_failure(operation: str, path: object) -> Iterator[None]:
    """Name `operation`, a verb, and `path` in an OSError that lacks both."""
    try:
        yield
    except OSError as error:
        if error.errno is None or is_named(error):
            raise
        raise OSError(error.errno, f"{_MARK}{operation} {printable(path)}: {_reason(error)}") from error


def is_named(error: BaseException) -> bool:
    """Whether an error says which operation failed, and on which path."""
    return isinstance(error, OSError) and isinstance(error.strerror, str) and error.strerror.startswith(_MARK)


def words_of(error: BaseException) -> str:
    """Describe an error: what failed, why, and what to do."""
    if isinstance(error, MemoryError):
        return (
            f"out of memory ({str(error) or 'no more is given'}): lower {named('host_memory')}, or {REMEDIES[errno.ENOMEM]}"
        )
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error) or type(error).__name__
    if is_named(error):
        return str(error.strerror)
    places = [printable(os.fsdecode(place)) for place in (error.filename, error.filename2) if isinstance(place, str | bytes)]
    return f"{' and '.join(places)}: {_reason(error)}" if places else str(error)


def describe_error(error: BaseException) -> str:
    """Describe an error with its type, unless it names what failed."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted by Ctrl-C or another signal{f': {error}' if str(error) else ''}"
    name = type(error).__name__
    return words_of(error) if is_named(error) else f"{name}: {error}" if str(error) else name


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a disk, or a user's quota, is full."""
    return isinstance(error, OSError) and error.errno in FULL


def shows_damage(error: BaseException) -> bool:
    """Whether an error means that bytes at rest are lost or damaged: one that may pass says nothing of them."""
    return isinstance(error, IntegrityError) or (isinstance(error, OSError) and error.errno in LOST)


def warn_once(device: int, lacking: str, message: str, *arguments: object) -> None:
    """Warn once in a process of what a file system, by its device, lacks."""
    with _saying:
        if (device, lacking) in _said:
            return
        _said.add((device, lacking))
    logger.warning(message, *arguments)


def _reason(error: OSError) -> str:
    """Why an operation failed, and what to do; words of our own say that already."""
    number = error.errno or 0
    remedy = REMEDIES.get(number) if error.strerror == os.strerror(number) else None
    return f"{error.strerror}; {remedy}" if remedy else str(error.strerror)
