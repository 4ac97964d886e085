"""Checkpoints of a lane: partials in memory are saved beside the lane's work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from oocattn import clock
from oocattn.pipelines.failing import CHECKPOINT, naming
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.pipelines.watch.events import Attended, Span

RECENT = 0.4
"""Of an interval: a chunk whose partials all came so shortly before a save is left to the next one, if it is still there."""


class Checkpoints:
    """Saves a lane's partials twice in an interval of seconds (0: never); `fail` is called with an error that ends it.

    So a kill costs no more than one interval of work: what came since the last save began, or shortly before, and what is in
    flight. Chunks that are begun, computed and written between two saves, as those of strips often are, are never saved,
    and a chunk whose last partial is in flight is not, either: it is finished next.
    """

    def __init__(self, partials: PartialStore, interval: float, fail: Callable[[BaseException], object]) -> None:
        self._partials = partials
        self._pause, self._recent = interval / 2, RECENT * interval
        self._fail = fail
        self._ended = threading.Event()
        self._saves: deque[tuple[Span, int]] = deque()
        self._thread: threading.Thread | None = None
        if interval:
            self._thread = threading.Thread(target=self._save_repeatedly, name="oocattn-checkpoints", daemon=True)
            self._thread.start()

    def add_to(self, event: Attended) -> Attended:
        """The event, with the checkpoints that were made since the last one."""
        made = [self._saves.popleft() for _ in range(len(self._saves))]
        if not made:
            return event
        spans = tuple(span for span, _ in made)
        written = sum(written for _, written in made)
        return replace(event, checkpoint_bytes=written, checkpointed=spans[-1].stop, spans=(*event.spans, *spans))

    def close(self) -> None:
        """Make no more checkpoints."""
        self._ended.set()
        self._partials.stop_waiting()
        if self._thread is not None:
            self._thread.join()

    def _save_repeatedly(self) -> None:
        took = 0.0
        while not self._ended.wait(max(0.0, self._pause - took)):
            start = clock.now()
            try:
                with naming(CHECKPOINT):
                    written = self._partials.save(patient=True, recent=self._recent)
            except BaseException as error:
                self._fail(error)
                return
            took = clock.now() - start
            if written:
                self._saves.append((Span("save", start, clock.now()), written))
