"""The interface of an engine, which runs tasks on lanes and reports their ends.

An `Engine` has the workers of one run, for as many attempts as it takes. `Lanes` are the lanes of one attempt: tasks are
submitted to them, their outcomes come back through a queue, in the order of completion. A new engine is a new file beside
this one, and a case in `Workplace`.
"""

from __future__ import annotations

import logging
import os
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from oocattn.errors import WorkerLostError
from oocattn.pipelines.failing import naming
from oocattn.pipelines.graph import Task
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.storage.files.operations import words_of

if TYPE_CHECKING:
    from oocattn.pipelines.deadline import Deadline
    from oocattn.pipelines.lane.lane import Lane
    from oocattn.pipelines.run import Run
    from oocattn.planning.plan import Plan
    from oocattn.storage.inputs.dataset import Dataset
    from oocattn.storage.results.growing import RunState

SAVING_SECONDS = 600.0
"""The longest time for lanes to save their work as a run ends."""

SILENT_SECONDS = 6.0
"""Seconds without a sign of life after which a worker is asked for one."""

NOT_STOPPED = "some tasks did not stop in time; their work is not saved"
NOT_SAVED = "what it held in memory may be lost, and is computed again"
NOT_CLOSED = "its lane may not be closed, and keep its memory"

logger = logging.getLogger("oocattn")

T = TypeVar("T")

Outcome = tuple[Task, TaskEvent | BaseException]
"""A task that has ended, and what it did, or why it failed."""

Check = Callable[[], object]
"""Called again and again while an engine waits; it ends the wait by raising."""


@dataclass(frozen=True)
class Obstacle:
    """A reason that keeps a worker from the tasks of a run, and advice."""

    fault: str
    remedy: str


@dataclass(frozen=True)
class LaneProgress:
    """How far the lane of a worker, named as in its events, is: pairs attended, and the moment of its last step."""

    worker: str
    pairs: int
    stepped: float


class WorkersChangedError(WorkerLostError):
    """Workers are `leaving`, as they were asked to, or others have joined: what is left is dealt out among those there."""

    def __init__(self, words: str, leaving: int = 0) -> None:
        super().__init__(words)
        self.leaving = leaving


class Lanes(ABC):
    """The lanes of one attempt, by number. `workers` names the worker of each.

    `outcomes` has the tasks that have ended; whoever wakes its reader puts None there. What may hang returns a future.
    """

    def __init__(self, workers: Sequence[str]) -> None:
        self.workers = list(workers)
        self.outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """True in the process that made the lanes, False in its forks."""
        return os.getpid() == self._process

    @property
    def in_process(self) -> bool:
        """True if the lanes work in this process, and stop with it."""
        return True

    @abstractmethod
    def open(self) -> Future[None]:
        """Make the lanes. The future has the error of the first that cannot be made."""

    @abstractmethod
    def submit(self, pieces: Sequence[Sequence[Task]]) -> None:
        """Submit tasks; each begins when those that it waits for, which come before it, have ended."""

    @abstractmethod
    def forget(self, task: Task) -> None:
        """The outcome of this task was dealt with: nothing waits for it any more."""

    @abstractmethod
    def find_lost(self) -> Future[Collection[str]]:
        """The workers that are gone. The future has a WorkerLostError where all are."""

    @abstractmethod
    def look(
        self, pending: Mapping[str, Sequence[Task]], workers: Sequence[str]
    ) -> tuple[dict[str, Obstacle], dict[str, float]]:
        """Obstacles of these workers (of all: ""), and seconds since their last step.

        `pending` are the unfinished tasks of each worker; it is empty while lanes are made.
        """

    @abstractmethod
    def progress(self) -> Mapping[str, LaneProgress]:
        """What is known of how far lanes are, by worker; at once."""

    def leaving(self) -> Collection[str]:
        """The workers that have told that they are to end, and begin nothing more."""
        return ()

    def joined(self) -> Collection[str]:
        """The workers that were not there when the lanes were made, as `find_lost` has last seen them."""
        return ()

    def silent(self) -> Collection[str]:
        """The workers that have told nothing of themselves for `SILENT_SECONDS`, though they do so all the time."""
        return ()

    @abstractmethod
    def stop(self, seconds: float) -> None:
        """Let no other task begin, and those that have begun end, for so many seconds."""

    @abstractmethod
    def save(self) -> int:
        """Have on disk what stopped lanes hold in memory alone; return the bytes written."""

    @abstractmethod
    def close(self, seconds: float) -> None:
        """Close the lanes that are still there; those that do not answer in so many seconds are left."""


class Engine(ABC):
    """The workers of one run, one lane each."""

    dashboard = ""
    """The address of the dashboard; "" where there is none."""

    lane_count = 0
    """Workers that take part."""

    in_process = True
    """Whether the lanes work in this process, and with its folder of job state."""

    @abstractmethod
    def enlist(self, plan: Plan, dataset: Dataset, state: RunState, check: Check) -> Mapping[str, str]:
        """Have the workers ready before a run begins; return their arithmetic (`arithmetic_of`).

        Raises ProblemError with all that is wrong with them.
        """

    @abstractmethod
    def replenish(self, check: Check, *, replacements: bool = True) -> None:
        """Have the workers ready again after a failure, or a change of them; WorkerLostError if none is left.

        With `replacements` it waits a while for those of workers that are gone.
        """

    def show(self, record: Callable[[], dict[str, Any]]) -> AbstractContextManager[None]:
        """Have a run watched while inside, in the dashboard, where there is one: `record` tells how far it is."""
        return nullcontext()

    @abstractmethod
    def lanes(self, run: Run, deadline: Deadline) -> Lanes:
        """The lanes of a new attempt at a run, not open yet."""


def perform(lane: Lane, task: Task) -> TaskEvent | None:
    """Do a task on its lane, unless that was stopped; TaskError, with its place, for an unforeseen error."""
    step, head_group, index = task.id
    with naming(task.place):
        match step:
            case "stage":
                return lane.stage(task.turn, head_group, index, task.chunks)
            case "attend":
                return lane.attend(task.turn)
            case "merge":
                return lane.merge(head_group, index)
            case "write":
                return lane.write(head_group, index)


@contextmanager
def warn_of_failure(consequence: str) -> Iterator[None]:
    """Log an error of the code inside as a warning, with its consequence."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s", consequence, words_of(error))


def collect_answers(calls: Mapping[str, Future[T]], seconds: float, consequence: str) -> dict[str, T]:
    """The answers of workers by name; one that fails, or is silent for so many seconds, is warned of."""
    wait(calls.values(), timeout=seconds)
    found = {}
    for name, call in calls.items():
        with warn_of_failure(f"worker {name}: {consequence}"):
            found[name] = call.result(timeout=0)
    return found
