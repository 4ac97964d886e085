"""The one clock of runs: moments to compare, even if the wall clock is set; wall time is for people to read."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_BEGINNING = time.time() - time.monotonic()  # wall-clock time at which the monotonic clock was 0, as first found here

_IMPORTED = time.monotonic()


def now() -> float:
    """The moment, in seconds since the epoch; it never goes back and never jumps."""
    return _BEGINNING + time.monotonic()


def rate(amount: float, seconds: float) -> float:
    """The amount per second; 0 where no time has passed, as on a coarse clock."""
    return amount / seconds if seconds > 0 else 0.0


def process_age() -> float:
    """Seconds since this process started, or since this import if that is unknown."""
    known = time.monotonic() - _IMPORTED
    with suppress(OSError, ValueError, IndexError):
        # Field 22 of proc(5): the start in clock ticks since boot. Field 2 is a name in brackets that may hold anything.
        ticks = int(Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
        if ticks > 0:
            return max(known, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return known
