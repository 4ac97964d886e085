"""The file in which a run tells other processes how far it is."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from oocattn import clock
from oocattn.pipelines.watch.events import (
    Attended,
    Committed,
    Ended,
    Event,
    Failed,
    Recovered,
    Saved,
    Staged,
    Stalled,
    Started,
    Written,
)
from oocattn.pipelines.watch.status import Status, tokens_of
from oocattn.records import to_json
from oocattn.storage.files.durable import write_text
from oocattn.storage.journal.claims import Claim

WRITING_SECONDS = 1.0  # seconds between updates of the file


class StatusFile:
    """A listener that writes progress to a file, once a second, under the run's lock."""

    def __init__(self, path: Path, claim: Claim) -> None:
        self._path = path
        self._claim = claim
        self._written = self._start = 0.0
        self._before = 0
        self._status = Status("running")

    def __call__(self, event: Event) -> None:
        match event:
            case Committed() | Ended():
                return  # the file has been removed
            case Started() | Recovered():
                self._begin_attempt(event)
            case Staged():
                self._add(bytes_read=event.bytes)
            case Written():
                self._add(event.stop, bytes_written=event.bytes)
            case Saved():
                self._add(event.stop, bytes_saved=event.bytes)
            case Attended():
                saved = event.checkpointed or (event.stop if event.partial_bytes else 0.0)
                self._add(saved, bytes_saved=event.partial_bytes + event.checkpoint_bytes)
                self._advance()
            case Failed():
                self._status = replace(self._status, error=event.error, stalled="")
            case Stalled():
                self._status = replace(self._status, stalled=event.reason, stalled_since=event.start)
        important = isinstance(event, Started | Recovered | Stalled | Failed)
        if important or clock.now() - self._written >= WRITING_SECONDS:
            self._written = clock.now()
            with suppress(OSError):  # a disk that is full stops the run elsewhere, with a better word
                self._claim.check()
                write_text(self._path, json.dumps(to_json(self._status)), synced=False)

    def _add(self, saved: float = 0.0, **counts: int) -> None:
        """Add bytes that were read, or brought to disk by the moment `saved`."""
        totals: dict[str, Any] = {name: getattr(self._status, name) + count for name, count in counts.items()}
        self._status = replace(self._status, saved=max(self._status.saved, saved), **totals)

    def _begin_attempt(self, event: Started | Recovered) -> None:
        """Count the subproblems that are left, and those that were done before."""
        if isinstance(event, Started):
            plan, left = event.plan, event.left
            self._status = Status(
                "running",
                plan.subproblems,
                tokens=tokens_of(plan.problem),
                seconds_left=plan.seconds * left / max(1, plan.subproblems),
                dashboard=event.dashboard,
            )
            self._before = plan.subproblems - left
            self._start = event.start
        done = self._status.subproblems - event.left
        self._before = min(self._before, done)
        self._status = replace(self._status, subproblems_done=done, stalled="")

    def _advance(self) -> None:
        """One more subproblem is done."""
        status, seconds = self._status, clock.now() - self._start
        done = status.subproblems_done + 1
        here = done - self._before
        self._status = replace(
            status,
            subproblems_done=done,
            rate=clock.rate(status.tokens * here / status.subproblems, seconds),
            seconds=seconds,
            seconds_left=seconds * (status.subproblems - done) / here,
        )
