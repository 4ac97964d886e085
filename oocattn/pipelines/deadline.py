"""When a run must have ended: its time limit, less what ending it takes."""

from __future__ import annotations

import math
import time

from oocattn.plans import Plan

MARGIN = 2.0
"""Seconds for what is not foreseen: closing the lanes, the last entry of the journal, a disk that is busy."""

SAVING_RATE = 1e9
"""Bytes per second at which what lanes hold in memory is taken to be saved."""


class Deadline:
    """A moment at which a run must have ended (seconds since the epoch), with what it holds in memory on disk.

    What is in flight is let end, which takes as long as the longest subproblem did so far, or as two are predicted to take.
    """

    def __init__(self, at: float, plan: Plan) -> None:
        self._at = at
        self._in_flight = 2 * plan.subproblem_seconds
        self._saving = plan.scratch_disk / SAVING_RATE if plan.saves else 0.0
        self._longest = 0.0

    @classmethod
    def never(cls, plan: Plan) -> Deadline:
        """That of a run without a time limit."""
        return cls(math.inf, plan)

    def learn(self, seconds: float) -> None:
        """So long a subproblem was in flight."""
        self._longest = max(self._longest, seconds)

    @property
    def left(self) -> float:
        """Seconds until the run must begin to end."""
        return self._at - time.time() - (self._longest or self._in_flight) - self._saving - MARGIN
