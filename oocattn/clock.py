"""The one clock of runs: moments that can be compared, whatever becomes of the wall clock meanwhile.

NTP, an administrator or a suspended virtual machine may set the wall clock to any time. Durations, rates and limits are
differences of the moments here; wall time (`time.time`, `time.strftime`) is for people to read.
"""

from __future__ import annotations

import time

_BEGINNING = time.time() - time.monotonic()
"""When this process's monotonic clock was 0, by the wall clock as it was at import."""

TICK = 1e-9
"""Seconds: durations are taken to be no shorter where something is divided by them, for a clock may stand."""


def now() -> float:
    """The moment, in seconds since the epoch. It never goes back and never jumps, as the wall clock may."""
    return _BEGINNING + time.monotonic()
