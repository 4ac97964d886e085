"""How far a run is, and how long it will still take: the one estimate that bar, status, log and pages show.

Work is counted in query-key pairs, tile by tile, for subproblems differ. A pair takes as long as pairs took so far in this
process, where the prediction of the plan counts like the first part of them. Time in which the run stalled does not count,
nor what passed before the first chunks were read. Whoever is called with the same events says the same at the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass

from oocattn import clock
from oocattn.pipelines.watch.events import Attended, Ended, Event, Failed, Progressed, Recovered, Staged, Stalled, Started

PREDICTION_COUNTS = 0.05  # the share of the work of this process that the plan's prediction counts like
MOST_OVERDUE = 0.9  # of what is left, that one step may be expected to bring: something is left until it has come


@dataclass(frozen=True)
class Estimate:
    """How far a run is at a moment.

    `share` is that of pairs, in flight included, and `in_flight` the pairs of these. `rate` is in tokens/s of the work since
    the run was started or resumed, `seconds` ago. `predicted_seconds` is what the plan said of the work of this process, and
    `expected_seconds` what that will have taken.
    """

    subproblems: int
    subproblems_done: int
    subproblems_before: int
    pairs: int
    pairs_done: int
    in_flight: int
    rate: float
    seconds: float
    seconds_left: float
    predicted_seconds: float

    @property
    def share(self) -> float:
        """Share of the pairs that are attended, 0 to 1."""
        return self.pairs_done / self.pairs if self.pairs else 1.0

    @property
    def expected_seconds(self) -> float:
        """Seconds that this process will have taken."""
        return self.seconds + self.seconds_left


class Pace:
    """A listener that is made of a run's Started and estimates from there on."""

    def __init__(self, started: Started) -> None:
        plan = started.plan
        self._start = self._working = self._advanced = started.start
        self._stop: float | None = None
        self._begun: float | None = None  # when the first chunks were read
        self._subproblems, self._pairs = plan.subproblems, plan.problem.pairs
        self._tokens = plan.problem.out_rows * plan.problem.batch / max(1, self._pairs)  # a pair
        self._done = self._before = plan.subproblems - started.left
        self._to_do = self._left = started.pairs_left  # at the start, and as this attempt began
        self._predicted = plan.seconds * self._to_do / max(1, self._pairs)
        self._earlier = self._ended = 0  # pairs of subproblems that ended in earlier attempts, and in this one
        self._flying: dict[str, int] = {}  # pairs in flight, by worker
        self._reached, self._step = 0, self._to_do / max(1, started.left)  # the last pairs known of, and how many came then
        self._stalled: float | None = None  # since when

    def __call__(self, event: Event) -> None:
        match event:
            case Recovered():
                self._begin_again(event)
            case Staged() if self._begun is None:
                self._begun = self._advanced = min(event.stop, clock.now())
            case Progressed():
                self._flying[event.worker] = event.pairs
                self._advance(event)
            case Attended():
                self._flying[event.worker] = max(0, self._flying.get(event.worker, 0) - event.pairs)
                self._ended += event.pairs
                self._done += 1
                self._advance(event)
            case Stalled():
                self._stall(event)
            case Failed():
                if event.done is not None:
                    self._begin_again(event)
                self._stop = event.stop
            case Ended():
                self._stop = event.stop

    def _begin_again(self, event: Recovered | Failed) -> None:
        """Take what is left by what is on disk: of what was attended since, not everything may be."""
        self._done = self._subproblems - event.left
        self._before = min(self._before, self._done)
        self._earlier, self._ended, self._left = self._earlier + self._ended, 0, event.pairs_left
        self._flying.clear()
        self._reached = self._earlier

    def _advance(self, event: Event) -> None:
        if self._attended > self._reached:
            self._step, self._reached = self._attended - self._reached, self._attended
            self._advanced = max(self._advanced, min(event.stop, clock.now()))  # the clock of another host may be wrong

    def _stall(self, event: Stalled) -> None:
        """The run stalls, or goes on."""
        if self._stalled is not None and event.stop > self._stalled:
            stood = event.stop - self._stalled  # as if all before had been so much later
            self._working, self._advanced = self._working + stood, self._advanced + stood
            self._begun = None if self._begun is None else self._begun + stood
        self._stalled = max(self._advanced, event.start) if event.reason else None

    @property
    def _attended(self) -> int:
        """Pairs that this process has attended."""
        return self._earlier + self._ended + sum(self._flying.values())

    def at(self, now: float) -> Estimate:
        """The estimate at a moment; once the run has ended, at its end."""
        now = max(now, self._start) if self._stop is None else self._stop
        in_flight = sum(self._flying.values())
        left = max(0, self._left - self._ended - in_flight)
        return Estimate(
            self._subproblems,
            self._done,
            self._before,
            self._pairs,
            self._pairs - left,
            in_flight,
            clock.rate(self._tokens * self._attended, self._advanced - self._working),
            now - self._start,
            self._seconds_left(now, left) if self._stop is None else 0.0,
            self._predicted,
        )

    def _seconds_left(self, now: float, left: float) -> float:
        took = max(0.0, self._advanced - (self._working if self._begun is None else self._begun))
        took += PREDICTION_COUNTS * self._predicted
        pairs = max(1.0, self._attended + PREDICTION_COUNTS * self._to_do)
        passed = max(0.0, (now if self._stalled is None else self._stalled) - self._advanced)
        step = min(self._step, MOST_OVERDUE * left)
        if passed <= step * took / pairs:
            return left * took / pairs - passed
        return (left - step) * (took + passed) / (pairs + step)  # as if the step came now
