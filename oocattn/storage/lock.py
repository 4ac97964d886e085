"""One run to a result: a lock that lives exactly as long as its process.

The lock is the kernel's (`flock`), so it is gone with the process that held it, however that ended; the file's text only
says who holds it. Whether such a lock is seen by other hosts depends on the file system (flock(2): on NFS since Linux
2.6.12, on CIFS since 5.5, unless they are mounted with local locks), so its holder also touches the file every few seconds:
what another kernel's process left there is taken over only when that has stopped.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from oocattn.errors import LockedError, TimeLimitError

PATIENCE = 0.5
"""Seconds to wait for a lock: one who only looks at who holds it has it for a moment."""

BEAT = 5.0
"""Seconds between touches of the file by its holder."""

BEATS_MISSED = 3
"""So many of them may fail to appear before a holder on another host is taken for dead."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Holder:
    """The host and process that hold a lock."""

    host: str
    process: int
    kernel: str = ""  # of which boot of which machine, as far as that is known

    @classmethod
    def this_process(cls) -> Holder:
        """The one that asks."""
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            kernel = ""
        return cls(socket.gethostname(), os.getpid(), kernel)

    def shares_kernel(self, other: Holder) -> bool:
        """Whether both see the same kernel's locks."""
        return self.kernel == other.kernel if self.kernel and other.kernel else self.host == other.host

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}"


NOBODY = Holder("unknown", 0)
"""Who holds a lock whose text cannot be read."""


class Lock:
    """Exclusive use of a result, as a context manager. Raises LockedError with the holder's host and process.

    A lock that was left behind is taken over, and a warning says from whom. Whether it was may take some seconds to tell:
    TimeLimitError where that would be after `until`, in seconds since the epoch.
    """

    def __init__(self, path: Path, until: float = math.inf) -> None:
        self.path = path
        self._file = path.open("a+")
        while not _lock(self._file, path):
            self._file.close()
            self._file = path.open("a+")
        try:
            _succeed(path, until)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(json.dumps(asdict(Holder.this_process())))
        self._file.flush()
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="oocattn-lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError, ValueError):  # the file system is away, or the file has just been closed
                if not self._is_ours():
                    logger.error("%s: %s has taken over: stop one of both", self.path.parent, _read(self.path))
                    return
                os.utime(self.path)

    def _is_ours(self) -> bool:
        """Whether nobody has taken this for left behind, as this process slept."""
        return _is_at(self._file, self.path) and _read(self.path) in (Holder.this_process(), NOBODY)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        if self._is_ours():
            self.path.unlink(missing_ok=True)
        self._file.close()


def _succeed(path: Path, until: float) -> None:
    """See to it that whoever left a lock file behind is gone, which its kernel or its silence tells."""
    text = path.read_text()
    if not text:
        return  # it is new
    before, last = _read(path), _touched(path)
    if not before.shares_kernel(Holder.this_process()):
        deadline = time.monotonic() + BEATS_MISSED * BEAT
        logger.warning("%s: watching for %g s whether %s is alive", path.parent, BEATS_MISSED * BEAT, before)
        while time.monotonic() < deadline:
            if time.time() > until:
                raise TimeLimitError(f"time limit reached before it was known whether {before} is alive")
            time.sleep(min(0.2, BEAT))
            if _touched(path) != last:
                raise _locked(path)
    logger.warning("%s: taking over from %s, which is gone", path.parent, before)


def _touched(path: Path) -> int:
    with path.open() as file:  # opened, so that a network file system asks its server
        return os.fstat(file.fileno()).st_mtime_ns


def _locked(path: Path) -> LockedError:
    return LockedError(f"{path.parent}: the result is being written by {_read(path)}; wait for it to end, or stop it")


def _lock(file: TextIO, path: Path) -> bool:
    """Lock an open file; False if it is no longer the one at `path`: its last holder removed it in between."""
    deadline = time.monotonic() + PATIENCE
    while not _try(file):
        if time.monotonic() < deadline:
            time.sleep(0.05)
            continue
        file.close()
        raise _locked(path)
    return _is_at(file, path)


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one at `path`: its holder may remove that at any time."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try(file: TextIO) -> bool:
    try:
        _flock(file, fcntl.LOCK_EX)
    except BlockingIOError:
        return False
    return True


def _flock(file: TextIO, kind: int) -> None:
    """Lock an open file. Raises BlockingIOError where another has it, OSError where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        words = "this file system gives no locks (flock), without which two runs could write one result: choose another path"
        raise OSError(error.errno, words, file.name) from error


def lock_holder(path: Path) -> Holder | None:
    """Who holds the lock at `path`, or None where no live process does, as far as can be told at once."""
    try:
        with path.open("r") as file:
            _flock(file, fcntl.LOCK_SH)
            touched = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return _read(path)
    holder = _read(path)
    elsewhere = holder != NOBODY and not holder.shares_kernel(Holder.this_process())
    return holder if elsewhere and time.time() - touched < BEATS_MISSED * BEAT else None


def _read(path: Path) -> Holder:
    try:
        text = json.loads(path.read_text())
        return Holder(str(text["host"]), int(text["process"]), str(text["kernel"]))
    except (OSError, ValueError, KeyError, TypeError):
        return NOBODY
