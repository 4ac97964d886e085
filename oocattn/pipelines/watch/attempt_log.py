"""The listener that keeps the record of an attempt on disk while it works, so that it outlives the process."""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np

from oocattn import clock
from oocattn.cores import count_cores
from oocattn.errors import IntegrityError, LockedError, OocattnError
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.attempts import (
    FORMAT,
    MOST_LINES,
    Attempt,
    Attempts,
    BusyRow,
    End,
    LogLine,
    OverTime,
    read_attempts,
    with_heartbeat,
)
from oocattn.pipelines.watch.events import (
    Attended,
    Ended,
    Event,
    Failed,
    Memory,
    Recovered,
    Resource,
    Saved,
    Staged,
    Stalled,
    Started,
    TaskEvent,
    Written,
)
from oocattn.pipelines.watch.lanes import Floats, LaneMemory, rows_of_lanes
from oocattn.pipelines.watch.pace import Pace
from oocattn.pipelines.watch.repeating import planned_of
from oocattn.pipelines.watch.series import Covered, Highest, Rates
from oocattn.pipelines.watch.status import last_written
from oocattn.pipelines.watch.timeline import RESOURCES
from oocattn.storage.files.durable import write_text
from oocattn.storage.files.folders import remove_file
from oocattn.storage.journal.claims import Holder
from oocattn.storage.paths import ATTEMPTS
from oocattn.text import printable
from oocattn.units import format_bytes
from oocattn.version import versions

WRITING_SECONDS, MIRRORING_SECONDS = 5.0, 60.0
"""Between two records at least; and between two that are sent to a store, where job state is kept there."""

MOST_SHARE = 0.002  # of the time of a run, that records of it take

FIRST_WIDTH = 2.0**-4  # seconds of a bin, at first
AMOUNTS = ("pairs", "read", "copied_in", "copied_out", "written", "saved")
_WORDS = 500  # characters of a line

logger = logging.getLogger("oocattn")


class AttemptLog:
    """A listener that adds this attempt to those at the run, and keeps its record up to date."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next = self._mirrored = 0.0
        self._seen = 0.0
        self._attempt: Attempt | None = None

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, Started):
            self._begin(event)
            self._write()
            return
        self._seen = max(self._seen, event.stop)
        if self._attempt is not None:
            self._pace(event)
        match event:
            case TaskEvent():
                self._add_task(event)
            case Recovered():
                self._count(recomputed=event.recomputed, retried=event.retried, workers_lost=event.workers_lost)
                self._note(event.stop, f"recovered: {event.error}")
            case Stalled():
                self._note(event.stop, f"stalled: {event.reason}" if event.reason else "the run continues")
            case Saved():
                self._add("saved", event.bytes, event.stop, event.stop)
                self._note(event.stop, f"{format_bytes(event.bytes)} saved as lanes stopped")
            case Failed():
                self._end("stopped" if event.stopped else "failed", event.error)
            case Ended():
                self._end("finished", "")
        if isinstance(event, Failed | Ended) or clock.now() >= self._next:
            self._write()

    def _begin(self, event: Started) -> None:
        self._seen, self._pace = event.stop, Pace(event)
        self._rates = Rates(event.start, AMOUNTS, FIRST_WIDTH)
        self._covered = Covered(self._rates)
        self._host, self._device = (Highest(event.start, FIRST_WIDTH) for _ in range(2))
        self._memory = LaneMemory()
        self._peak_host = self._peak_device = 0
        self._totals = dict.fromkeys(AMOUNTS, 0)
        self._counts: Counter[str] = Counter()
        self._lanes: set[str] = set()
        self._log: deque[LogLine] = deque(maxlen=MOST_LINES)
        done = event.plan.subproblems - event.left
        self._before = _earlier_attempts(self._run, done)  # before the file of its status is that of this attempt
        self._attempt = _new_attempt(self._run, event)
        if event.recomputed:
            self._count(recomputed=event.recomputed)
            self._note(event.stop, f"{event.recomputed:,} partials or records were damaged, and are computed again")

    def _add_task(self, event: TaskEvent) -> None:
        self._lanes.add(event.worker)
        for span in event.spans:
            self._covered.add(f"{span.resource}/{event.worker}", span.start, span.stop)
        start, stop = event.extent
        self._add("copied_in", event.copied_in, start, stop)
        self._add("copied_out", event.copied_out, start, stop)
        match event:
            case Staged():
                self._add("read", event.bytes, start, stop)
            case Written():
                self._add("written", event.bytes, start, stop)
            case Attended():
                self._add("pairs", event.pairs, start, stop)
                self._add("saved", event.partial_bytes + event.checkpoint_bytes, event.stop, event.stop)
                self._count(out_of_memory=event.out_of_memory)
                if event.memory is not None:
                    self._take_memory(event.memory, event.stop)
                if event.out_of_memory:
                    self._note(event.stop, f"lane {event.worker}: out of device memory; it continues with smaller tiles")

    def _take_memory(self, memory: Memory, moment: float) -> None:
        self._memory.add(memory)
        host, device = self._memory.host, self._memory.device
        self._peak_host, self._peak_device = max(self._peak_host, host), max(self._peak_device, device)
        self._host.add(host, moment)
        self._device.add(device, moment)

    def _add(self, name: str, amount: int, start: float, stop: float) -> None:
        if amount:
            self._totals[name] += amount
            self._rates.add(name, amount, start, stop)

    def _count(self, **more: int) -> None:
        self._counts.update({name: number for name, number in more.items() if number})

    def _note(self, moment: float, words: str) -> None:
        self._log.append(LogLine(moment, printable(words)[:_WORDS]))

    def _end(self, end: End, words: str) -> None:
        if self._attempt is not None:
            self._attempt = replace(self._attempt, end=end, words=printable(words)[:_WORDS].rstrip(": "))

    def _record(self) -> Attempts | None:
        """All attempts, this one as it is now."""
        if self._attempt is None:
            return None
        busy: defaultdict[str, float] = defaultdict(float)
        for name, seconds in self._covered.seconds.items():
            busy[name.partition("/")[0]] += seconds
        counted: dict[str, Any] = {f"bytes_{name}": self._totals[name] for name in AMOUNTS if name != "pairs"}
        counted |= {name: self._counts[name] for name in ("recomputed", "retried", "workers_lost", "out_of_memory")}
        reached = self._pace.at(clock.now())
        now = replace(
            self._attempt,
            seen=max(self._seen, clock.now()) if self._attempt.end == "" else self._seen,
            lanes=len(self._lanes),
            subproblems=max(0, reached.subproblems_done - self._attempt.subproblems_before),
            pairs=self._totals["pairs"],
            peak_host=self._peak_host,
            peak_device=self._peak_device,
            **counted,
            busy={name: round(busy[name], 4) for name in RESOURCES if name in busy},
            log=tuple(self._log),
            over_time=self._over_time(),
        )
        return self._before.adding(now)

    def _over_time(self) -> OverTime:
        width = max(self._rates.width, self._host.width, self._device.width)
        self._rates.coarsen_to(width)
        rates = self._rates.rates()
        lanes: dict[str, dict[str, Floats]] = {lane: {} for lane in self._lanes}
        for name, seconds in self._covered.seconds.items():
            resource, _, lane = name.partition("/")
            lanes[lane][resource] = np.array([seconds, *rates[name]])
        rows = [
            BusyRow(printable(lane)[:100], cast(Resource, resource), round(float(seconds), 4), _percent(shares))
            for lane, resource, (seconds, *shares) in rows_of_lanes(lanes)
        ]
        return OverTime(
            width=width,
            rates={name: tuple(float(f"{rate:.4g}") for rate in rates[name]) for name in AMOUNTS},
            host=self._host.values(width),
            device=self._device.values(width),
            busy=tuple(rows),
        )

    def _write(self) -> None:
        """Write the record; the next time is so late that writing takes a small share of the run."""
        began = time.perf_counter()
        record, run = self._record(), self._run
        if record is None:
            return
        ended = record.attempts[-1].end
        try:
            with suppress(OSError, LockedError):  # what stops the run says so elsewhere, with a better word
                run.state.claim.check()
                if ended == "finished":
                    run.paths.save({ATTEMPTS: record.text()})
                    if run.paths.beside is not None:
                        remove_file(run.paths.state / ATTEMPTS)
                else:
                    self._keep(record.text(), at_once=bool(ended) or not self._next)
        finally:
            took = time.perf_counter() - began
            self._next = clock.now() + max(WRITING_SECONDS, took / MOST_SHARE)

    def _keep(self, text: str, at_once: bool) -> None:
        path, mirror = self._run.paths.state / ATTEMPTS, self._run.paths.mirror
        write_text(path, text, synced=False)
        if mirror is not None and (at_once or clock.now() - self._mirrored >= MIRRORING_SECONDS):
            self._mirrored = clock.now()
            mirror.push(path)


def _earlier_attempts(run: Run, done: int) -> Attempts:
    """The attempts at this run before this one, which left so many subproblems `done`.

    The last of them is with what its last heartbeat said.
    """
    found = None
    try:
        found = read_attempts(run.paths)
    except (OocattnError, OSError) as error:
        logger.warning("%s; the report says nothing of attempts before this one", error)
    if found is None or found.run != run.journal.run:
        return Attempts(FORMAT, run.journal.run, planned_of(run), 0, ())
    if not found.attempts or found.attempts[-1].end:
        return found
    last = None
    with suppress(IntegrityError, OSError):
        last = last_written(run.paths.status)
    *others, newest = found.attempts
    newest = newest if last is None else with_heartbeat(newest, last)
    return replace(found, attempts=(*others, replace(newest.having_saved(done), end="killed")))


def _new_attempt(run: Run, event: Started) -> Attempt:
    return Attempt(
        started=event.start,
        seen=event.stop,
        end="",
        words="",
        process=str(Holder.this_process())[:_WORDS],
        hardware=_hardware(run.computing),
        versions={"oocattn": "", **versions(), "python": platform.python_version()},
        lanes=0,
        subproblems_before=event.plan.subproblems - event.left,
        pairs_before=event.plan.problem.pairs - event.pairs_left,
        subproblems=0,
        pairs=0,
        bytes_read=0,
        bytes_written=0,
        bytes_saved=0,
        bytes_copied_in=0,
        bytes_copied_out=0,
        peak_host=0,
        peak_device=0,
        recomputed=0,
        retried=0,
        workers_lost=0,
        out_of_memory=0,
        busy={},
        log=(),
        over_time=None,
    )


def _hardware(computing: Mapping[str, str]) -> dict[str, str]:
    """What computes: the driver's host, and the arithmetic of the workers."""
    import psutil

    found = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor(),
        "cores": str(count_cores()),
        "memory": format_bytes(psutil.virtual_memory().total),
        **{name: value for name, value in computing.items() if name not in ("torch", "arithmetic")},
    }
    return {name: printable(value)[:_WORDS] for name, value in found.items()}


def _processor() -> str:
    """The model of the processor, as Linux names it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"


def _percent(shares: Iterable[float]) -> str:
    return "".join(f"{min(99, round(100 * share)):02}" for share in shares)
