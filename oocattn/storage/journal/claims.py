"""The holder of a lock, as its file names it, and the claim of its run."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

from oocattn.errors import IntegrityError
from oocattn.records import ADDED, Count, Range, from_json, parse_json
from oocattn.storage.files.regular import read_file
from oocattn.text import printable

MOST_BYTES = 4096
"""Of a lock file: a host's name, two numbers and a token."""


@dataclass(frozen=True)
class Holder:
    """The host and process that hold a lock; `token` is another one each time."""

    host: str
    process: Annotated[int, Range(0, 2**32)]
    kernel: str = ""  # of which boot of which machine, as far as that is known
    token: str = field(default="", compare=False)
    flocked: Annotated[bool, ADDED] = field(default=True, compare=False)  # whether the kernel's lock is held too
    started: Annotated[Count, ADDED] = field(default=0, compare=False)  # in the kernel's ticks since its boot; 0: unknown
    pids: Annotated[str, ADDED] = field(default="", compare=False)  # the namespace of process numbers; "" where unknown

    @classmethod
    def this_process(cls) -> Holder:
        """The one that asks."""
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            kernel = ""
        pids, started = "", 0
        with suppress(OSError):
            pids, started = os.readlink("/proc/self/ns/pid"), _start_of(os.getpid()) or 0
        return cls(socket.gethostname(), os.getpid(), kernel, uuid.uuid4().hex, started=started, pids=pids)

    def shares_kernel(self, other: Holder) -> bool:
        """Whether both see the same kernel's locks."""
        return self.kernel == other.kernel if self.kernel and other.kernel else self.host == other.host

    @property
    def is_told_by_kernel(self) -> bool:
        """Whether this kernel's locks tell if this holder is alive."""
        return self.flocked and self.shares_kernel(Holder.this_process())

    @property
    def has_ended(self) -> bool:
        """Whether this kernel tells that the process has ended, its number reused or not; False where that is unknown."""
        here = Holder.this_process()
        if not (self.kernel and self.started and self.pids) or (self.kernel, self.pids) != (here.kernel, here.pids):
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's, whose /proc may be hidden
            pass
        try:
            return _start_of(self.process) != self.started
        except OSError:
            return False

    def __str__(self) -> str:
        return f"process {self.process} on host {printable(self.host)}"


def _start_of(process: int) -> int | None:
    """When a process was started, in ticks since the boot; None for one that has ended and waits for its parent.

    Raises OSError where the kernel does not tell.
    """
    content = Path(f"/proc/{process}/stat").read_bytes()
    state, *fields = content.rpartition(b")")[2].split()  # proc_pid_stat(5), from its third field on
    return None if state in (b"Z", b"X") else int(fields[18])


UNKNOWN_HOLDER = Holder("unknown", 0)
"""Who holds a lock whose text cannot be read."""


class Claim(Protocol):
    """What a lock gives to all who work under it; small, and can be sent."""

    def check(self, *, afresh: bool = False) -> None:
        """Raise LockedError where the lock is not held any more. Asked before each step that others would see.

        `afresh` asks although it was known a moment ago: before a step that would remove what others have written since.
        """


@dataclass(frozen=True)
class UndisputedClaim:
    """The claim of a run whose caller sees to it that there is no other (`lock="none"`), on another machine."""

    def check(self, *, afresh: bool = False) -> None:
        """It is held."""


def read_holder(path: Path) -> Holder:
    """Who holds the lock whose file this is; `UNKNOWN_HOLDER` where that cannot be read."""
    try:
        return parse_holder(read_file(path, MOST_BYTES, follow=False))
    except (OSError, ValueError, IntegrityError):
        return UNKNOWN_HOLDER


def parse_holder(content: bytes) -> Holder:
    """The holder that a lock file names. Raises ValueError for anything else."""
    return from_json(Holder, parse_json(content))
