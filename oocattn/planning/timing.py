"""How long work takes by itself, measured on a machine whose cores others use, too.

Linux says how long each thread stood ready without getting a core (`schedstat`, proc(5)). Elsewhere that counts as 0, and
what is measured on a busy machine is too slow.
"""

from __future__ import annotations

import heapq
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from oocattn.cores import count_cores

_TASKS = Path("/proc/self/task")

READING_SECONDS = 0.25
"""How often threads are looked at, which takes a millisecond; one that ends leaves no trace of its waiting."""


class CoreClock:
    """Times what this process does from now on, and how long its threads wait for a core meanwhile."""

    def __init__(self) -> None:
        self._start, self._start_busy = time.perf_counter(), time.process_time()
        self._read, self._last = self._start, _read_threads()
        self._ran: defaultdict[str, float] = defaultdict(float)
        self._waited: defaultdict[str, float] = defaultdict(float)

    def note(self) -> None:
        """Look at the threads, unless that was done just now."""
        if time.perf_counter() - self._read >= READING_SECONDS:
            self.read()

    def read(self) -> None:
        """Look at the threads that there are."""
        found = _read_threads()
        for thread, (ran, waited) in found.items():
            before = self._last.get(thread, (0.0, 0.0))
            if ran < before[0] or waited < before[1]:  # its number went to another thread
                before = 0.0, 0.0
            self._ran[thread] += ran - before[0]
            self._waited[thread] += waited - before[1]
        self._read, self._last = time.perf_counter(), found

    def seconds(self, threads: int = 1) -> tuple[float, float]:
        """The seconds until now, and how many of them work on so many threads has waited for cores.

        Those are the threads that ran longest. Others that wait, of Python, hold nothing up. Of several threads that are
        ready at the same time each takes its share of the work. And no work is done faster than all cores do it.
        """
        wall, busy = time.perf_counter() - self._start, time.process_time() - self._start_busy
        longest = heapq.nlargest(threads, ((self._ran[thread], waited) for thread, waited in self._waited.items()))
        ran, waited = (sum(column) for column in zip((0.0, 0.0), *longest, strict=True))
        at_once = max(1.0, (ran + waited) / max(wall, 1e-9))
        return wall, wall - min(wall, max(wall - waited / at_once, busy / count_cores(), 1e-9))


def undisturbed_seconds(work: Callable[[], object], threads: int = 1) -> float:
    """How long `work`, on so many threads of this process, takes where no other process wants a core."""
    clock = CoreClock()
    work()
    clock.read()
    wall, waited = clock.seconds(threads)
    return wall - waited


def _read_threads() -> dict[str, tuple[float, float]]:
    """Seconds for which each thread of this process has run, and for which it has stood ready without a core."""
    found: dict[str, tuple[float, float]] = {}
    with suppress(OSError):
        for thread in os.listdir(_TASKS):
            with suppress(OSError, ValueError), open(f"{_TASKS}/{thread}/schedstat", "rb") as file:
                ran, waited, *_ = map(int, file.read().split())  # none if it has ended, or the system keeps no such times
                found[thread] = ran / 1e9, waited / 1e9
    return found
