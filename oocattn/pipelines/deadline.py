"""When a run must have ended: its time limit, less what ending it takes."""

from __future__ import annotations

import math

from oocattn import clock
from oocattn.pipelines.events import Event
from oocattn.plans import Plan

MARGIN = 2.0
"""Seconds for what is not foreseen: closing the lanes, the last entry of the journal, a disk that is busy."""

SILENCE, LEAST_SILENCE = 15.0, 1.0
"""Seconds in which a worker must answer as a run ends, or it is done without; and those it has however late it is."""

STALLED, STALLED_TIMES = 600.0, 20
"""Seconds in which one task of a run must end at least, and those in so many times what two subproblems take, where that is
longer. A task that takes more hangs: in a read of storage that does not answer, or on a worker that was stopped."""

SAVING_RATE = 1e9
"""Bytes per second at which what lanes hold in memory is taken to be saved."""


class Deadline:
    """A moment at which a run must have ended (seconds since the epoch), with what it holds in memory on disk.

    What is in flight is let end: two subproblems, which take as long as the longest did so far, or as is predicted.
    """

    def __init__(self, at: float, plan: Plan) -> None:
        self._at = at
        self._predicted = 2 * plan.subproblem_seconds
        self._at_a_time = 2 if plan.device == "cpu" else 1  # a GPU's lane counts the time behind the one before
        self._saving = plan.scratch_disk / SAVING_RATE if plan.saves else 0.0
        self._longest = 0.0

    def learn(self, event: Event) -> None:
        """A subproblem was attended, and what was held in memory saved meanwhile: how long that took."""
        self._longest = max(self._longest, event.stop - event.start)
        self._saving = max([self._saving, *(span.stop - span.start for span in event.spans if span.resource == "save")])

    @property
    def in_flight(self) -> float:
        """Seconds until what is in flight has ended."""
        return self._at_a_time * self._longest or self._predicted

    @property
    def stalled(self) -> float:
        """Seconds without the end of any task after which a run has stalled."""
        return max(STALLED, STALLED_TIMES * self.in_flight)

    @property
    def least(self) -> float:
        """Seconds that a run needs at least to do anything."""
        return self.in_flight + self._saving + MARGIN

    @property
    def left(self) -> float:
        """Seconds until the run must begin to end."""
        return self._at - clock.now() - self.least

    @property
    def patience(self) -> float:
        """Seconds for which to wait as a run ends until tasks have ended."""
        return self.stalled if self._at == math.inf else self.in_flight + self.silence

    @property
    def silence(self) -> float:
        """Seconds for which to wait for a worker that does not answer: there are two such waits as a run ends."""
        return max(LEAST_SILENCE, min(SILENCE, (self._at - clock.now()) / 2))
