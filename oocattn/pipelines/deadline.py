"""When a run must have ended: its time limit, less what ending it takes."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median

from oocattn import clock
from oocattn.pipelines.watch.events import Attended, TaskEvent
from oocattn.planning.plan import Plan

MARGIN_SECONDS = 2.0  # for what is not foreseen: closing the lanes, the last entry of the journal, a busy disk
SILENCE_SECONDS = 15.0  # in which a worker must answer as a run ends, or it is done without
LEAST_SILENCE_SECONDS = 1.0  # that it has however late it is

STALLED_SECONDS, STALLED_TIMES = 180.0, 5
"""A run ends after so many seconds in which no task ended or got on, or so many times its longest step if that is more."""

NOTICED_SECONDS, NOTICED_TIMES = 30.0, 2
"""After so many seconds the workers are asked what keeps them, and again after as many. Where nothing is found that does,
the run is said to stall only after so many times its longest step."""

REMEMBERED = 31  # tasks of each kind whose seconds are remembered
SAVING_RATE = 1e9  # bytes per second at which what lanes hold in memory is taken to be saved


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
        tasks = max(1, min(plan.subproblems, plan.query_chunks * plan.problem.head_groups))
        self._planned_step = self._at_a_time * max(link.seconds for link in plan.links) * plan.lanes / tasks
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def learn(self, event: TaskEvent) -> None:
        """A task ended, and what was held in memory was saved meanwhile: how long that took."""
        self._took[event.kind].append(event.stop - event.start)
        if isinstance(event, Attended):
            self._longest = max(self._longest, event.stop - event.start)
        self._saving = max([self._saving, *(span.stop - span.start for span in event.spans if span.resource == "save")])

    @property
    def in_flight_seconds(self) -> float:
        """Seconds until what is in flight has ended."""
        return self._at_a_time * self._longest or self._predicted

    @property
    def step_seconds(self) -> float:
        """Seconds of the longest step between the ends of two tasks: as planned, or as tasks took so far."""
        # Their median: one that was stopped for a while does not make a run wait longer the next time.
        took = max(map(median, self._took.values()), default=0.0)
        return max(self._planned_step, self._at_a_time * took, self._saving)

    @property
    def stalled_seconds(self) -> float:
        """Seconds without the end of any task after which a run ends."""
        return max(STALLED_SECONDS, STALLED_TIMES * self.step_seconds)

    @property
    def noticed_seconds(self) -> float:
        """Seconds without the end of any task after which a run is said to stall, though nothing is found that keeps it."""
        return max(NOTICED_SECONDS, NOTICED_TIMES * self.step_seconds)

    @property
    def least_seconds(self) -> float:
        """Seconds that a run needs at least to do anything."""
        return self.in_flight_seconds + self._saving + MARGIN_SECONDS

    @property
    def seconds_left(self) -> float:
        """Seconds until the run must begin to end."""
        return self._at - clock.now() - self.least_seconds

    @property
    def patience_seconds(self) -> float:
        """Seconds for which to wait as a run ends until tasks have ended."""
        return self.stalled_seconds if self._at == math.inf else self.in_flight_seconds + self.silence_seconds

    @property
    def silence_seconds(self) -> float:
        """Seconds for which to wait for workers to answer as a run ends; one that did not is not waited for again."""
        return max(LEAST_SILENCE_SECONDS, min(SILENCE_SECONDS, (self._at - clock.now()) / 2))
