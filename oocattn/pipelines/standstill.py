"""A run in which nothing ends: for how long, which worker is why, what to do, and when it has been too long.

A lane of which no task has ended for a while is looked at by its engine. A lane that still does pieces of a task works,
however much longer the task takes than was planned. Time is that in which the driver waited: what passes while its own
process is stopped does not count.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from oocattn import clock
from oocattn.errors import StalledError
from oocattn.pipelines import deadline as limits
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.base import Obstacle
from oocattn.pipelines.graph import Task
from oocattn.pipelines.watch.events import Callback, Stalled
from oocattn.text import some_of
from oocattn.units import format_seconds

MOST_NAMED = 3  # tasks or workers of a kind in a message

Pending = Mapping[str, Sequence[Task]]  # the unfinished tasks of each worker; empty while lanes are made
Look = Callable[[Pending, Sequence[str]], tuple[dict[str, Obstacle], dict[str, float]]]  # see `Lanes.look`

logger = logging.getLogger("oocattn")


class Standstill:
    """Watches that tasks of an attempt end: tells what keeps them, and raises StalledError when none did for too long."""

    def __init__(
        self, workers: Iterable[str], pending: Callable[[], Pending], look: Look, emit: Callback, deadline: Deadline
    ) -> None:
        self._pending = pending
        self._look_at = look
        self._emit = emit
        self._deadline = deadline
        self._waited = self._looked = self._progressed = 0.0
        self._ended = dict.fromkeys(workers, 0.0)  # how long was waited in all when a task of each last ended
        self._obstacles: Mapping[str, Obstacle] = {}
        self._silent: frozenset[str] = frozenset()

    def progress(self, worker: str) -> None:
        """A task of this worker's lane ended."""
        self._progressed = self._ended[worker] = self._waited
        if worker in self._obstacles or "" in self._obstacles:
            self._tell({})

    def step(self, worker: str, seconds_ago: float) -> None:
        """The lane of this worker last did a piece of a task so many seconds ago."""
        moment = self._waited - seconds_ago
        if moment > self._ended[worker]:
            self._ended[worker] = moment
            self._progressed = max(self._progressed, moment)
            if "" in self._obstacles:
                self._tell({})

    def note_silent(self, workers: Collection[str]) -> None:
        """These workers give no sign of life: they are asked at once, and again when they give one."""
        before, self._silent = self._silent, frozenset(workers)
        if asked := before ^ self._silent:
            others = {name: obstacle for name, obstacle in self._obstacles.items() if name not in asked}
            self._tell({**others, **self._look(self._pending(), sorted(asked))})

    def begin(self) -> None:
        """Lanes are made: their tasks can begin."""
        self._progressed = self._waited
        self._ended = dict.fromkeys(self._ended, self._waited)
        self._tell({})

    def add(self, seconds: float) -> None:
        """So long was waited. Raises StalledError where nothing has ended for too long."""
        self._waited += seconds
        if self._is_stalled:
            pending = self._pending()
            obstacles = self._look(pending, list(pending or self._ended)) or {"": self._unexplained(pending)}
            if not self._is_stalled:
                return  # a long task still works
            idle = format_seconds(self._idle)
            raise StalledError(
                f"nothing has ended for {idle}: {_words(obstacles)}; the work that was done is on disk: resume then"
            )
        if self._waited - max(self._looked, min(self._ended.values())) >= limits.NOTICED_SECONDS:
            before, self._looked = self._progressed, self._waited
            pending = self._pending()
            idle_workers = [
                name for name in pending or self._ended if self._waited - self._ended[name] >= limits.NOTICED_SECONDS
            ]
            obstacles = self._look(pending, idle_workers)
            if not obstacles and self._progressed > before:
                self._looked = self._progressed
            elif not obstacles and self._idle >= self._deadline.noticed_seconds:
                obstacles = {"": self._unexplained(pending)}
            self._tell(obstacles)

    @property
    def _is_stalled(self) -> bool:
        """True if nothing has ended for so long that the run ends; this is cheap to ask."""
        return self._idle > limits.STALLED_SECONDS and self._idle > self._deadline.stalled_seconds

    @property
    def _idle(self) -> float:
        """Seconds since a task last ended or made progress."""
        return self._waited - self._progressed

    def _look(self, pending: Pending, workers: Sequence[str]) -> dict[str, Obstacle]:
        """Obstacles of these workers (of all: ""). A lane at a long task still works."""
        if not workers:
            return {}
        obstacles, idle = self._look_at(pending, workers)
        for name, seconds in idle.items():
            if seconds < limits.NOTICED_SECONDS:
                self._ended[name] = max(self._ended[name], self._waited - seconds)
                self._progressed = max(self._progressed, self._ended[name])
        return obstacles

    def _unexplained(self, pending: Pending) -> Obstacle:
        """What is left where no worker is kept from its tasks: one of them does not end."""
        places = dict.fromkeys(task.place for tasks in pending.values() for task in tasks[:1])
        unfinished = some_of(list(places), MOST_NAMED) or "the set-up of lanes"
        return Obstacle(
            f"{unfinished} does not end on worker {some_of(list(pending or self._ended), MOST_NAMED)}",
            "check the storage that it reads and writes, and restart the worker",
        )

    def _tell(self, obstacles: Mapping[str, Obstacle]) -> None:
        """Log what keeps the run, or that nothing does any more, and pass it on; once each time that it changes."""
        before, self._obstacles = self._obstacles, obstacles
        remedies, remedies_before = ({name: each.remedy for name, each in told.items()} for told in (obstacles, before))
        if remedies == remedies_before:
            return
        now = clock.now()
        reason = _words(obstacles)
        if reason:
            limit = format_seconds(self._deadline.stalled_seconds)
            logger.warning("the run stalls: %s; it ends, and can be resumed, when no task has ended for %s", reason, limit)
        else:
            logger.warning("the run continues")
        since = min((self._ended[name] for name in obstacles if name), default=self._progressed)
        self._emit(Stalled(start=now - (self._waited - since), stop=now, reason=reason))


def _words(obstacles: Mapping[str, Obstacle]) -> str:
    """What keeps which workers, and what to do."""
    named: dict[Obstacle, list[str]] = {}
    for name, obstacle in obstacles.items():
        named.setdefault(obstacle, []).append(name)
    words = [
        f"{f'worker {some_of(names, MOST_NAMED)} ' if any(names) else ''}{obstacle.fault}: {obstacle.remedy}"
        for obstacle, names in itertools.islice(named.items(), MOST_NAMED)
    ]
    return "; ".join(words)
