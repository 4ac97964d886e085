"""How long work takes by itself, measured on a machine whose cores others use, too.

Linux says how long each thread stood ready without getting a core (`schedstat`, proc(5)). Elsewhere that counts as 0, and
what is measured on a busy machine is too slow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TASKS = Path("/proc/self/task")


class _Reading(NamedTuple):
    """The clocks of this process in seconds: wall time, its time on cores, and the waiting of each thread for one."""

    wall: float
    busy: float
    waited: dict[str, float]


def undisturbed_seconds(work: Callable[[], object], threads: int = 1) -> float:
    """How long `work`, on so many threads of this process or more, takes where no other process wants a core.

    Threads that work at the same time wait at the same time, and no work is done faster than all cores do it.
    """
    start = _read_clocks()
    work()
    end = _read_clocks()
    wall, busy = end.wall - start.wall, end.busy - start.busy
    waited = sum(max(0.0, seconds - start.waited.get(thread, 0.0)) for thread, seconds in end.waited.items())
    at_once = max(threads, (busy + waited) / max(wall, 1e-9))
    return min(wall, max(wall - waited / at_once, busy / count_cores(), 1e-9))


def count_cores() -> int:
    """The cores that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def _read_clocks() -> _Reading:
    waited: dict[str, float] = {}
    with suppress(OSError):
        for thread in _TASKS.iterdir():
            with suppress(OSError, ValueError, IndexError):  # it has ended, or the system keeps no such times
                waited[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return _Reading(time.perf_counter(), time.process_time(), waited)
