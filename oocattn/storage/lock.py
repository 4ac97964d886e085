"""One run to a result: a lock file that lives exactly as long as its process.

The lock is the kernel's (`flock`), so it is gone with the process that held it, however that ended; the file's text only
says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from oocattn.errors import LockedError

PATIENCE = 0.5
"""Seconds to wait for a lock: one who only looks at who holds it has it for a moment."""


@dataclass(frozen=True)
class Holder:
    """The host and process that hold a lock."""

    host: str
    process: int

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}"


class Lock:
    """Exclusive use of a result, as a context manager. Raises LockedError with the holder's host and process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+")
        while not _lock(self._file, path):
            self._file.close()
            self._file = path.open("a+")
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
        self._file.flush()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


def _lock(file: TextIO, path: Path) -> bool:
    """Lock an open file; False if it is no longer the one at `path`: its last holder removed it in between."""
    deadline = time.monotonic() + PATIENCE
    while not _try(file):
        if time.monotonic() < deadline:
            time.sleep(0.05)
            continue
        holder = _read(path)
        file.close()
        raise LockedError(
            f"{path.parent}: the result is being written by {holder}; wait for it to end, or stop it"
        ) from None
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _try(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_holder(path: Path) -> Holder | None:
    """Who holds the lock at `path`, or None where no live process does."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _read(path)
    return None


def _read(path: Path) -> Holder:
    try:
        text = json.loads(path.read_text())
        return Holder(str(text["host"]), int(text["process"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder("unknown", 0)
