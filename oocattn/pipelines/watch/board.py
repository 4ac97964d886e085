"""The board of a run: a listener that keeps a small, bounded record of it, which pages and reports show.

The record is made when somebody asks for it, and has JSON-ready values alone. docs/dashboard.md says what they mean.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from oocattn import clock
from oocattn.pipelines.watch.events import (
    Attended,
    Ended,
    Event,
    Failed,
    Recovered,
    Saved,
    Staged,
    Stalled,
    Started,
    TaskEvent,
    Written,
)
from oocattn.pipelines.watch.lanes import LaneMemory, rows_of_lanes
from oocattn.pipelines.watch.pace import Pace
from oocattn.pipelines.watch.pair_progress import PairProgress
from oocattn.pipelines.watch.series import Busy, Rates
from oocattn.planning.plan import Plan
from oocattn.text import printable
from oocattn.units import format_bytes, format_seconds

VERSION = 1  # of the record

FIRST_WIDTH = 0.5  # seconds of a bin of rates, at first
WINDOW_SECONDS = 60.0  # over which the board says how busy lanes are
CELLS = 60  # into which it divides them
MOST_LINES = 100  # of the log
MOST_WORDS = 300  # characters of a line
SCRATCH_SECONDS = 2.0  # between two looks at the disk

AMOUNTS = ("pairs", "read", "copied in", "copied out", "written", "saved")


class Board:
    """A listener that keeps the record of a run to `result`. `scratch_bytes` tells the bytes of its scratch on disk."""

    def __init__(self, result: str, scratch_bytes: Callable[[], int] = lambda: 0) -> None:
        self._result = result
        self._scratch_bytes = scratch_bytes
        self._scratch, self._scratch_seen = 0, -math.inf
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._log: deque[dict[str, Any]] = deque(maxlen=MOST_LINES)
        self._state = "starting"
        self._words = ""
        self._saved = 0.0

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._event = event.stop
            if self._plan is not None:
                self._pace(event)
            match event:
                case Started():
                    self._begin(event)
                case TaskEvent():
                    self._add_task(event)
                case Recovered():
                    self._pairs = PairProgress(self._planned, event.done)
                    self._set("running")
                    self._note(event.stop, f"recovered: {event.error}")
                case Stalled():
                    self._set("stalled" if event.reason else "running", event.reason)
                    self._note(event.stop, f"stalled: {event.reason}" if event.reason else "the run continues")
                case Saved():
                    self._saved = max(self._saved, event.stop)
                    self._note(event.stop, f"{format_bytes(event.bytes)} saved as lanes stopped")
                case Failed():
                    if event.done is not None and self._plan is not None:
                        self._pairs = PairProgress(self._plan, event.done)
                    self._end(event.stop, "failed", event.error)
                case Ended():
                    self._end(event.stop, "finished", "")

    @property
    def _planned(self) -> Plan:
        assert self._plan is not None, "events come after Started"
        return self._plan

    def _begin(self, event: Started) -> None:
        plan = self._plan = event.plan
        self._start, self._stop, self._pace = event.start, 0.0, Pace(event)
        self._pairs = PairProgress(plan, event.done)
        self._rates = Rates(event.start, AMOUNTS, FIRST_WIDTH)
        self._busy: dict[str, dict[str, Busy]] = {}
        self._memory = LaneMemory()
        self._not_finite: set[str] = set()
        self._saved = 0.0
        self._set("running")
        if event.resumed:
            self._note(event.stop, f"resumed: {event.left:,} of {plan.subproblems:,} subproblems are left")
        if event.recomputed:
            self._note(event.stop, f"{event.recomputed:,} partials or records were damaged, and are computed again")

    def _add_task(self, event: TaskEvent) -> None:
        lane = self._busy.setdefault(event.worker, {})
        for span in event.spans:
            if span.resource not in lane:
                lane[span.resource] = Busy()
            lane[span.resource].add(span.start, span.stop)
        start, stop = event.extent
        self._rates.add("copied in", event.copied_in, start, stop)
        self._rates.add("copied out", event.copied_out, start, stop)
        match event:
            case Staged():
                self._pairs.stage(event.head_group, event.index)
                self._rates.add("read", event.bytes, start, stop)
                for name in {*event.not_finite} - self._not_finite:
                    self._not_finite.add(name)
                    self._note(event.stop, f"the array {name} has NaN or Inf")
            case Attended():
                self._attend(event, start, stop)
            case Written():
                self._rates.add("written", event.bytes, start, stop)
                self._saved = max(self._saved, event.stop)

    def _attend(self, event: Attended, start: float, stop: float) -> None:
        self._pairs.attend(event.head_group, event.index)
        self._rates.add("pairs", event.pairs, start, stop)
        if event.partial_bytes or event.checkpoint_bytes:
            self._rates.add("saved", event.partial_bytes + event.checkpoint_bytes, event.stop, event.stop)
            self._saved = max(self._saved, event.checkpointed or event.stop)
        if event.memory:
            self._memory.add(event.memory)
        if event.out_of_memory:
            self._note(event.stop, f"lane {event.worker}: out of device memory; it continues with smaller tiles")

    def _set(self, state: str, words: str = "") -> None:
        self._state, self._words = state, printable(words)[:MOST_WORDS]

    def _end(self, moment: float, state: str, words: str) -> None:
        self._set(state, words)
        self._stop = moment
        self._note(moment, f"{state}{': ' * bool(words)}{words}")

    def _note(self, moment: float, words: str) -> None:
        self._log.append({"moment": moment, "words": printable(words)[:MOST_WORDS]})

    def record(self) -> dict[str, Any]:
        """The record as it is now."""
        if clock.now() - self._scratch_seen > SCRATCH_SECONDS:  # outside of the lock: a file system may be slow
            self._scratch, self._scratch_seen = self._scratch_bytes(), clock.now()
        with self._lock:
            found = {
                "version": VERSION,
                "result": printable(self._result),
                "process": f"{socket.gethostname()}, process {os.getpid()}",
                "moment": clock.now(),
                "state": self._state,
                "words": self._words,
                "log": list(self._log),
            }
            if self._plan is not None:
                found |= self._progress(self._plan, self._stop or clock.now())
            return found

    def _progress(self, plan: Plan, now: float) -> dict[str, Any]:
        found = self._pace.at(now)
        return {
            "problem": printable(plan.problem),
            "kernel": plan.kernel,
            "started": self._start,
            "seconds": now - self._start,
            "last_event": self._event,
            "subproblems": plan.subproblems,
            "subproblems_done": found.subproblems_done,
            "subproblems_before": found.subproblems_before,
            "share": 1.0 if self._state == "finished" else found.share,
            "pairs": found.pairs,
            "pairs_done": found.pairs_done,
            "pairs_in_flight": found.in_flight,
            "seconds_left": found.seconds_left,
            "predicted_seconds": found.predicted_seconds,
            "expected_seconds": found.expected_seconds,
            "matrix": self._pairs.matrix(),
            "head_groups": plan.problem.head_groups,
            "strip": self._pairs.strip(),
            "rates": self._rates_now(plan),
            "lanes": self._lanes(now),
            "memory": self._memory_now(plan),
            "scratch": {"bytes": 0 if self._state == "finished" else self._scratch, "most": plan.scratch_disk},
            "saved": self._saved,
            "checkpoint_seconds": plan.checkpoint_seconds if plan.saves else 0.0,
        }

    def _rates_now(self, plan: Plan) -> dict[str, Any]:
        problem, found = plan.problem, self._rates.rates()
        pairs = max(1, problem.pairs)
        of_pairs = {
            "tokens": problem.out_rows * problem.batch / pairs,
            "flops": problem.flops / pairs,
        }
        series = {name: [each * factor for each in found["pairs"]] for name, factor in of_pairs.items()}
        copied = ("copied in", "copied out") if plan.device == "cuda" else ()  # a CPU computes where chunks were read
        series |= {name: found[name] for name in ("read", *copied, "written", "saved")}
        return {
            "width": self._rates.width,
            "ceiling": plan.machine.kernel_flops * plan.lanes,
            "totals": self._rates.totals(),
            "series": {name: [float(f"{each:.4g}") for each in rates] for name, rates in series.items()},
        }

    def _lanes(self, now: float) -> dict[str, Any]:
        """Shares of the last minute up to the last thing known in which resources of lanes were busy."""
        everyone = [busy for lane in self._busy.values() for busy in lane.values()]
        until = max((busy.stops[-1] for busy in everyone if busy.stops), default=now)
        seconds = max(1e-3, min(WINDOW_SECONDS, until - self._start))
        for busy in everyone:
            busy.drop_before(until - WINDOW_SECONDS)
        edges = np.linspace(until - seconds, until, CELLS + 1)
        shares = {lane: {name: busy.shares(edges) for name, busy in found.items()} for lane, found in self._busy.items()}
        return {
            "until": until,
            "seconds": seconds,
            "count": len(self._busy),
            "rows": [
                {
                    "lane": printable(lane)[:MOST_WORDS],
                    "resource": resource,
                    "share": round(float(cells.mean()), 4),
                    "cells": [round(float(cell), 2) for cell in cells],
                }
                for lane, resource, cells in rows_of_lanes(shares)
            ],
        }

    def _memory_now(self, plan: Plan) -> dict[str, Any]:
        return {
            "host": self._memory.host,
            "host_peak": plan.peak_host,
            "host_budget": plan.host_memory,
            "device": self._memory.device,
            "device_peak": plan.peak_device if plan.device == "cuda" else 0,
            "device_budget": plan.device_memory if plan.device == "cuda" else 0,
            "processes": self._memory.processes,
        }


def describe_times(record: Mapping[str, Any]) -> str:
    """How long a run takes, and how that compares with its plan, in words."""
    predicted, expected = record["predicted_seconds"], record["expected_seconds"]
    words = f"planned {format_seconds(predicted)}"
    if predicted > 0 and (record["subproblems_done"] > record["subproblems_before"] or record["state"] == "finished"):
        difference = expected / predicted - 1
        words += f", {abs(difference):.0%} {'more' if difference > 0 else 'less'} than that"
    return words
