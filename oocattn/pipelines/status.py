"""How far a run is, for those who did not start it: a small file that the run keeps up to date, and its reader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from oocattn.errors import IntegrityError
from oocattn.pipelines.events import Event
from oocattn.pipelines.report import RunReport
from oocattn.plans import Plan
from oocattn.storage.lock import lock_holder
from oocattn.storage.result import ResultPaths, read_json, write_json
from oocattn.units import format_seconds

INTERVAL = 1.0
"""Seconds between updates of the file."""


@dataclass(frozen=True)
class Status:
    """State of a result: "none", "running", "interrupted" (unfinished, and nobody works on it) or "finished".

    `rate` is in tokens/s of the work done since the run was started or resumed, `seconds` ago; `seconds_left` is wall time
    too.
    """

    state: str
    subproblems: int = 0
    subproblems_done: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    seconds_left: float = 0.0
    dashboard: str = ""
    holder: str = ""
    error: str = ""

    def __str__(self) -> str:
        if self.state == "none":
            return "none: no run has begun here"
        if self.state == "finished":
            return f"finished in {format_seconds(self.seconds)}" if self.seconds else "finished"
        if not self.subproblems_done and self.state == "running":
            return f"running: starting; {self.holder}"
        share = self.subproblems_done / self.subproblems if self.subproblems else 0.0
        lines = [
            f"{self.state}: {self.subproblems_done:,} of {self.subproblems:,} subproblems ({share:.0%}) after "
            f"{format_seconds(self.seconds)}, {self.rate:,.0f} tokens/s"
        ]
        if self.state == "running":
            lines.append(f"about {format_seconds(self.seconds_left)} left; {self.holder}; dashboard {self.dashboard}")
        if self.error:
            lines.append(f"it failed with {self.error}")
        if self.state == "interrupted":
            lines.append("resume it: `oocattn resume`, or the same run again")
        return "\n".join(lines)


class StatusFile:
    """A listener that writes a run's progress to a file, once a second at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = self._start = 0.0
        self._tokens = self._before = 0
        self._status = Status("running")

    def __call__(self, event: Event) -> None:
        if event.kind == "started":
            plan = cast(Plan, event.detail["plan"])
            self._tokens = plan.problem.tokens * plan.problem.batch
            self._status = Status("running", plan.subproblems, dashboard=str(event.detail["dashboard"]))
            self._again(event)
        elif event.kind == "failed" and "left" in event.detail:
            self._again(event)
        elif event.kind == "attended":
            self._status = self._advanced(self._status.subproblems_done + 1)
            if time.time() - self._written >= INTERVAL:
                self._write()
        elif event.kind == "failed" and event.head_group < 0:
            self._status = replace(self._status, error=str(event.detail["error"]))
            self._write()

    def _again(self, event: Event) -> None:
        """So many subproblems are left, and the others were done before."""
        self._before = self._status.subproblems - cast(int, event.detail["left"])
        self._start = event.start
        self._status = replace(self._status, subproblems_done=self._before)
        self._write()

    def _advanced(self, done: int) -> Status:
        seconds = time.time() - self._start
        here = done - self._before
        return replace(
            self._status,
            subproblems_done=done,
            rate=self._tokens * here / self._status.subproblems / seconds,
            seconds=seconds,
            seconds_left=seconds * (self._status.subproblems - done) / here,
        )

    def _write(self) -> None:
        self._written = time.time()
        write_json(self._path, asdict(self._status))


def read_status(paths: ResultPaths) -> Status:
    """How far the run to this result is, whether or not one is alive. Raises IntegrityError for a damaged file."""
    holder = lock_holder(paths.lock)
    text = read_json(paths.status)
    if text is None or (holder is None and not paths.growing.exists()):
        report = read_json(paths.report)
        if "problem" not in (paths.attributes() or {}):
            return Status("none") if holder is None else Status("running", holder=str(holder))
        return Status("finished", seconds=RunReport.from_json(report).seconds if report else 0.0)
    state = "interrupted" if holder is None else "running"
    words = "" if holder is None else str(holder)
    return _checked({**text, "state": state, "holder": words}, paths.status)


def _checked(content: Mapping[str, Any], path: Path) -> Status:
    """The status in a file, once its names, types and ranges are what `StatusFile` writes."""
    try:
        status = Status(**content)
    except TypeError as error:
        raise IntegrityError(f"{path}: not the status of a run ({error})") from None
    for name, value in asdict(status).items():
        default = getattr(Status("none"), name)
        right = value >= 0 if isinstance(value, int | float) else True
        if not right or isinstance(value, str) != isinstance(default, str):
            raise IntegrityError(f"{path}: not the status of a run ({name} is {value!r})")
    return status
