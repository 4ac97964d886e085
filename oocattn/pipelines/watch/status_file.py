"""The file in which a run tells other processes how far it is, and that it lives."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from oocattn import clock
from oocattn.errors import LockedError
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
from oocattn.pipelines.watch.pace import Pace
from oocattn.pipelines.watch.status_record import Status, tokens_of
from oocattn.records import to_json
from oocattn.storage.files.durable import write_text
from oocattn.storage.files.folders import remove_file
from oocattn.storage.journal.claims import Claim

WRITING_SECONDS = 1.0  # seconds between updates of the file by events
BEAT_SECONDS = 1.0  # seconds between heartbeats
KEPT_SECONDS = 10.0  # after so many seconds in one listener the run is said to stall


class StatusFile(AbstractContextManager["StatusFile"]):
    """A listener that writes progress to a file under the run's lock, as events come and with each heartbeat.

    The heart is a thread that beats from the first event to the last one, or until the `with` ends. It is a daemon: it keeps
    no interpreter alive. `kept_by` names the listener that keeps the run, and since when, or is None. `tell` is called with
    what is written. A fork of the process writes nothing.
    """

    def __init__(
        self,
        path: Path,
        claim: Claim,
        kept_by: Callable[[], tuple[str, float] | None] = lambda: None,
        tell: Callable[[Status], object] = lambda status: None,
    ) -> None:
        self._path = path
        self._claim = claim
        self._kept_by = kept_by
        self._tell = tell
        self._process = os.getpid()
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        self._written = 0.0
        self._pace: Pace | None = None
        self._status = Status("running")

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def __call__(self, event: Event) -> None:
        if os.getpid() != self._process:
            return
        with self._changing:
            if isinstance(event, Committed | Ended):
                self._end()
                return
            self._take(event)
            important = isinstance(event, Started | Recovered | Stalled | Failed)
            if important or clock.now() - self._written >= WRITING_SECONDS:
                self._write()
            if isinstance(event, Failed):
                self._ended.set()
            elif self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="oocattn-heart", daemon=True)
                self._heart.start()

    def _take(self, event: Event) -> None:
        """What an event changes of the status."""
        if self._pace is not None:
            self._pace(event)
        match event:
            case Started():
                self._pace = Pace(event)
                problem = event.plan.problem
                self._status = Status("running", tokens=tokens_of(problem), batch=problem.batch, dashboard=event.dashboard)
            case Recovered():
                self._status = replace(self._status, stalled="")
            case Staged():
                self._add(bytes_read=event.bytes)
            case Written():
                self._add(event.stop, bytes_written=event.bytes)
            case Saved():
                self._add(event.stop, bytes_saved=event.bytes)
            case Attended():
                saved = event.checkpointed or (event.stop if event.partial_bytes else 0.0)
                self._add(saved, bytes_saved=event.partial_bytes + event.checkpoint_bytes)
            case Failed():
                self._status = replace(self._status, error=event.error, stalled="")
            case Stalled():
                self._status = replace(self._status, stalled=event.reason, stalled_since=event.start)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._changing:
                if self._ended.is_set():
                    return
                try:
                    self._write()
                except LockedError:  # another process has taken over: whatever drives the run finds that itself
                    return

    def _write(self) -> None:
        """Write the status as it is at this moment."""
        self._written = now = clock.now()
        status, kept = self._status, self._kept_by()
        if self._pace is not None:
            found = self._pace.at(now)
            status = replace(
                status,
                beat=now,
                **{name: getattr(found, name) for name in ("subproblems", "subproblems_done", "pairs", "pairs_done")},
                **{name: getattr(found, name) for name in ("rate", "seconds", "seconds_left")},
            )
        if kept is not None and not status.stalled and now - kept[1] >= KEPT_SECONDS:
            reason = f"the listener {kept[0]} has not returned: the run waits for it"
            status = replace(status, stalled=reason, stalled_since=kept[1])
        self._tell(status)
        with suppress(OSError):  # a disk that is full stops the run elsewhere, with a better word
            self._claim.check()
            write_text(self._path, json.dumps(to_json(status)), synced=False)

    def _end(self) -> None:
        """The result is there: the file has been removed, unless the heart has written it in that moment."""
        self._ended.set()
        with suppress(OSError):
            remove_file(self._path)

    def _add(self, saved: float = 0.0, **counts: int) -> None:
        """Add bytes that were read, or brought to disk by the moment `saved`."""
        totals: dict[str, Any] = {name: getattr(self._status, name) + count for name, count in counts.items()}
        self._status = replace(self._status, saved=max(self._status.saved, saved), **totals)
