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

_TASKS = Path("/proc/self/task")

READING_SECONDS = 0.5
"""How often threads are looked at, which takes a millisecond; one that ends leaves no trace of its waiting."""


class CoreClock:
    """Times what this process does from now on, and how long its threads wait for a core meanwhile."""

    def __init__(self) -> None:
        self._start, self._start_busy = time.perf_counter(), time.process_time()
        self._read, self._waited, self._threads = self._start, 0.0, _read_waiting()

    def note(self) -> None:
        """Look at the threads, unless that was done just now."""
        if time.perf_counter() - self._read >= READING_SECONDS:
            self.read()

    def read(self) -> None:
        """Look at the threads that there are."""
        found = _read_waiting()
        for thread, seconds in found.items():
            before = self._threads.get(thread, 0.0)
            self._waited += seconds - before if seconds >= before else seconds  # else its number went to another thread
        self._read, self._threads = time.perf_counter(), found

    def seconds(self, threads: int = 1) -> tuple[float, float]:
        """The seconds until now, and how many of them work on so many threads or more has waited for cores.

        Threads that work at the same time wait at the same time, and no work is done faster than all cores do it.
        """
        wall, busy = time.perf_counter() - self._start, time.process_time() - self._start_busy
        at_once = max(threads, (busy + self._waited) / max(wall, 1e-9))
        return wall, wall - min(wall, max(wall - self._waited / at_once, busy / count_cores(), 1e-9))


def undisturbed_seconds(work: Callable[[], object], threads: int = 1) -> float:
    """How long `work`, on so many threads of this process or more, takes where no other process wants a core."""
    clock = CoreClock()
    work()
    clock.read()
    wall, waited = clock.seconds(threads)
    return wall - waited


def count_cores() -> int:
    """The cores that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def _read_waiting() -> dict[str, float]:
    """Seconds for which each thread of this process has stood ready without a core."""
    waited: dict[str, float] = {}
    with suppress(OSError):
        for thread in _TASKS.iterdir():
            with suppress(OSError, ValueError, IndexError):  # it has ended, or the system keeps no such times
                waited[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return waited
