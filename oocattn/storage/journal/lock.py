"""The lock of a result: it lives as long as its process.

The lock is the kernel's (`flock`), so it is gone with the process that held it, however that ended; the file's text
says who holds it. Whether other hosts see such a lock depends on the file system (flock(2): on NFS since Linux 2.6.12,
on CIFS since 5.5, unless they are mounted with local locks). So the holder also touches the file every few seconds:
what another kernel's process left there is taken over only when that has stopped. A file system may have no locks at
all (NFS without its lock daemon, some in user space): only touching and watching keeps others away. A lock file says which.

A holder that slept through a takeover must not go on. So each acquisition has a token of its own, in the file, which is
asked for before every step that commits, discards, deletes or records. A fork of the holder has it in vain.

How the file changes, always whole:
  1. Lock a temporary file beside it, if that can be, and write holder and token to it.
  2. Nothing at the path: give it that name, unless something has it by now; then begin again.
  3. A file at the path: lock it, which succeeds only if its holder is gone or on another kernel; if it is on another
     kernel, or without the kernel's lock, watch for its beats. Then give the temporary file its name. Whoever waited for
     the old file finds another one under its name. Which file is which is told by its text: inodes may change.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from weakref import WeakSet

from oocattn.clock import now
from oocattn.errors import IntegrityError, LockedError, TimeLimitError
from oocattn.storage.files.durable import PARTIAL, sync_descriptor
from oocattn.storage.files.operations import UNSUPPORTED, name_failure, warn_once
from oocattn.storage.files.regular import open_regular, read_exactly, read_file
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.journal.claims import MOST_BYTES, UNKNOWN_HOLDER, Holder, parse_holder, read_holder

PATIENCE = 0.5
"""Seconds to wait for a lock: one who only looks at who holds it has it for a moment."""

BEAT = 2.0  # seconds between touches of the file by its holder
RELEASE_SECONDS = 10.0  # seconds for which a release waits for a touch in flight
BEATS_MISSED = 3  # so many of them may fail to appear before a holder on another host is taken for dead
GRACE = 0.1
"""Seconds for which a lock file without words is watched: one is whole from its first moment where the file system can
rename or link it, and nearly so elsewhere."""

_NO_LOCKS = frozenset({errno.ENOLCK, *UNSUPPORTED})

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class FileClaim:
    """The claim of the holder with this token to the lock file at a path."""

    path: Path
    token: str

    def check(self, *, afresh: bool = False) -> None:
        """Raise LockedError where the lock is lost, OSError where that is unknown. It is asked afresh each time."""
        if self.token in _left_to_parent:
            raise LockedError(
                f"{self.path.parent}: this process is a fork of {read_holder(self.path)}, and the run goes on there alone"
            )
        if not self.holds():
            taken = "removed or moved"
            if os.path.lexists(self.path):
                taken = f"lost to {read_holder(self.path)}, which took it for dead"
            raise LockedError(
                f"{self.path.parent}: the lock of this run was {taken}: this run ends; see whether another one goes on, and "
                "resume if not"
            )

    def holds(self) -> bool:
        """Whether the file has this token, and this process is no fork of the holder."""
        if self.token in _left_to_parent:
            return False
        try:
            return parse_holder(read_file(self.path, MOST_BYTES, follow=False)).token == self.token
        except (FileNotFoundError, NotADirectoryError, IntegrityError, ValueError):
            return False


class FileLock(AbstractContextManager["FileLock"]):
    """The lock of a result on a file system.

    Raises LockedError with the holder's host and process. A stale lock is taken over, with a warning. Whether it is
    stale may take some seconds to tell: TimeLimitError where that would be after `until`, a moment of `clock.now`.
    """

    def __init__(self, path: Path, until: float = math.inf) -> None:
        self.path = path
        self.holder = Holder.this_process()
        self.claim = FileClaim(path, self.holder.token)
        self._descriptor = _acquire(path, self.holder, until)
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="oocattn-lock", daemon=True)
        self._beating.start()
        _held.add(self)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # the file system is away
                if not self.is_held():
                    logger.error(
                        "%s: the lock was taken over by %s; this run ends", self.path.parent, read_holder(self.path)
                    )
                    return
                self._touch()

    def _touch(self) -> None:
        """Advance the file's modification time, by writing where it cannot be set."""
        before = os.fstat(self._descriptor).st_mtime_ns
        with suppress(OSError):
            os.utime(self._descriptor)
        if os.fstat(self._descriptor).st_mtime_ns == before:
            os.pwrite(self._descriptor, os.pread(self._descriptor, MOST_BYTES, 0), 0)

    def is_held(self) -> bool:
        """Whether nobody has taken this for left behind, as this process slept."""
        return self.claim.holds()

    def release(self) -> None:
        """Release the lock, and remove its file unless another process took over. In a fork, nothing happens."""
        if self.claim.token in _left_to_parent:
            return
        _held.discard(self)
        self._released.set()
        self._beating.join(RELEASE_SECONDS)
        if self._beating.is_alive():  # it might touch another file, if that had the descriptor
            logger.warning(
                "%s: the file system does not answer; the lock is left behind, a later run takes it over", self.path
            )
            return
        with suppress(OSError):
            if self.is_held():
                self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def __exit__(self, *error: object) -> None:
        self.release()


_held: WeakSet[FileLock] = WeakSet()

_left_to_parent: set[str] = set()  # tokens of locks that were held when this process was forked


def _leave_all_to_parent() -> None:
    """Give up locks that this process shares as a fork of their holder. It may live longer."""
    while _held:
        lock = _held.pop()
        _left_to_parent.add(lock.claim.token)
        os.close(lock._descriptor)


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _acquire(path: Path, holder: Holder, until: float) -> int:
    """Open the lock file at `path`, locked, with the holder's text in it."""
    temporary = path.with_name(f"{path.name}.{holder.token}{PARTIAL}")
    with name_failure("lock", path):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            flocked = _flock(descriptor, fcntl.LOCK_EX, path)
            os.write(descriptor, json.dumps(asdict(replace(holder, flocked=flocked))).encode())
            if not flocked:
                warn_once(
                    os.fstat(descriptor).st_dev,
                    "locks",
                    "%s: this file system has no locks (flock); other runs are kept away by a file that this one touches "
                    "every %g s, and a stale one is watched for %g s before it is taken over",
                    *(path.parent, BEAT, BEATS_MISSED * BEAT),
                )
                sync_descriptor(descriptor, path)  # so that other hosts find it whole, which a lock would see to
            while not _give_name(temporary, path, until, flocked):
                pass
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise
    return descriptor


def _give_name(temporary: Path, path: Path, until: float, flocked: bool) -> bool:
    """Give the lock file its name. False where a stale one that had it is gone meanwhile."""
    with suppress(FileExistsError):
        rename_new(temporary, path)
        return True
    try:
        with open_regular(path, follow=False, writable=True) as left:  # NFS locks only those exclusively
            flocked &= _lock(left, path)
            if not _is_at(left, path):
                return False
            _watch(path, until, flocked)
            if not _is_at(left, path):
                return False
            os.rename(temporary, path)
    except FileNotFoundError:
        return False
    return True


def _watch(path: Path, until: float, flocked: bool) -> None:
    """Return when the holder of a stale lock file is gone. Its kernel tells where it was `flocked`, or else its silence."""
    try:
        before = parse_holder(read_file(path, MOST_BYTES, follow=False))
    except (ValueError, IntegrityError):  # one that cannot be read at all is left: somebody may hold it
        before = UNKNOWN_HOLDER
    last = _touch_time(path)
    if flocked and before == UNKNOWN_HOLDER:  # no lock that was made whole
        time.sleep(GRACE)
    elif not (flocked and before.is_told_by_kernel):
        deadline = time.monotonic() + BEATS_MISSED * BEAT
        logger.warning(
            "%s: watching for %g s whether %s is alive, who holds the lock", path.parent, BEATS_MISSED * BEAT, before
        )
        while time.monotonic() < deadline:
            if now() > until:
                raise TimeLimitError(f"time limit reached before it was known whether {before} is alive")
            time.sleep(min(0.2, BEAT))
            if _touch_time(path) != last:
                raise _locked_error(path)
    logger.warning("%s: the stale lock of %s is taken over", path.parent, before)


def _touch_time(path: Path) -> int:
    with open_regular(path, follow=False) as descriptor:  # opened, so that a network file system asks its server
        return os.fstat(descriptor).st_mtime_ns


def _locked_error(path: Path) -> LockedError:
    return LockedError(f"{path.parent}: the result is being written by {read_holder(path)}; wait for it to end, or stop it")


def _lock(descriptor: int, path: Path) -> bool:
    """Lock the open file of another holder; False where the file system has no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _flock(descriptor, fcntl.LOCK_EX, path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _locked_error(path) from None
        time.sleep(0.05)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open lock file is the one at `path`, not removed meanwhile."""
    try:
        with open_regular(path, follow=False) as there:
            return read_exactly(there, MOST_BYTES, 0, path) == read_exactly(descriptor, MOST_BYTES, 0, path)
    except FileNotFoundError:
        return False


def _flock(descriptor: int, kind: int, path: Path) -> bool:
    """Lock an open file; False where the file system has no locks. Raises BlockingIOError where another process has it."""
    try:
        with name_failure("lock", path):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def lock_holder(path: Path) -> Holder | None:
    """The live holder of the lock at `path`, or None, without waiting.

    Raises IntegrityError where something other than a file is there, OSError as the file system does.
    """
    try:
        with open_regular(path, follow=False) as descriptor:
            flocked = _flock(descriptor, fcntl.LOCK_SH, path)
            content = read_exactly(descriptor, MOST_BYTES, 0, path)
            touched = os.fstat(descriptor).st_mtime
        holder = parse_holder(content)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # none, or one that nobody made
        return None
    except BlockingIOError:
        return read_holder(path)
    if (flocked and holder.is_told_by_kernel) or holder.has_ended:
        return None
    return holder if time.time() - touched < BEATS_MISSED * BEAT else None


def holder_silence(path: Path) -> float:
    """Seconds since the holder touched its lock file. 0 for another kernel's, whose clock may differ."""
    if not read_holder(path).shares_kernel(Holder.this_process()):
        return 0.0
    try:
        return max(0.0, time.time() - _touch_time(path) / 1e9)
    except OSError:
        return 0.0
