"""The inline engine: tasks on threads of this process, without a scheduler.

It is for tests, notebooks and small calls: a task costs a fraction of a millisecond, and there is no dashboard. Its threads
are daemons, so a task that hangs keeps no interpreter from its exit.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from oocattn import clock
from oocattn.kernels.arithmetic import arithmetic_of
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.base import (
    NOT_CLOSED,
    NOT_SAVED,
    NOT_STOPPED,
    SAVING_SECONDS,
    Check,
    Engine,
    LaneProgress,
    Lanes,
    Obstacle,
    collect_answers,
    perform,
)
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.graph import Task, TaskId
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.planning.plan import Plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.growing import RunState
from oocattn.threads import begin_call

THREADS = 6  # of a lane: up to four attend (on a GPU), others stage, merge and write

logger = logging.getLogger("oocattn")

T = TypeVar("T")


class InlineEngine(Engine):
    """A lane on the CPU, or one on each of so many GPUs at most, as the plan counts them, all in this process."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._devices: list[str] = []

    def enlist(self, plan: Plan, dataset: Dataset, state: RunState, check: Check) -> Mapping[str, str]:
        self._devices = (
            ["cpu"] if plan.device == "cpu" else [f"cuda:{index}" for index in range(min(plan.lanes, self._count))]
        )
        self.lane_count = len(self._devices)
        return arithmetic_of(plan.kernel, plan.problem, plan.device)

    def replenish(self, check: Check, *, replacements: bool = True) -> None:
        check()

    def lanes(self, run: Run, deadline: Deadline) -> InlineLanes:
        return InlineLanes(run, self._devices)


@dataclass
class _Waiting:
    """A task that has not begun, and how many others it waits for."""

    task: Task
    count: int


class InlineLanes(Lanes):
    """Lanes of a run in this process, one on each of the devices, with a few threads each."""

    def __init__(self, run: Run, devices: Sequence[str]) -> None:
        super().__init__([f"inline-{number}" for number in range(len(devices))])
        self._run = run
        self._devices = devices
        self._lanes: list[Lane] = []
        self._ready: list[queue.SimpleQueue[Task | None]] = [queue.SimpleQueue() for _ in self.workers]
        self._dependents: dict[TaskId, list[_Waiting]] = {}  # of each task that has not ended
        self._changing = threading.Condition()
        self._executing = 0
        self._stopped = False

    def open(self) -> Future[None]:
        return begin_call(self._open)

    def _open(self) -> None:
        with naming(SET_UP):
            for device in self._devices:
                lane = Lane(self._run, device)
                with self._changing:
                    stopped = self._stopped
                    if not stopped:
                        self._lanes.append(lane)
                if stopped:  # while it was made: nobody waits for it
                    lane.close()
                    return
        for number in range(len(self._lanes)):
            for _ in range(THREADS):
                threading.Thread(target=self._work, args=(number,), name="oocattn-task", daemon=True).start()

    def submit(self, pieces: Sequence[Sequence[Task]]) -> None:
        with self._changing:
            for task in itertools.chain.from_iterable(pieces):
                pending = [self._dependents[other] for other in task.after if other in self._dependents]
                self._dependents[task.id] = []
                waiting = _Waiting(task, len(pending))
                for dependents in pending:
                    dependents.append(waiting)
                if not pending:
                    self._ready[task.lane].put(task)

    def _work(self, number: int) -> None:
        """Do the tasks of a lane as they become ready, in one of its threads."""
        while (task := self._ready[number].get()) is not None:
            with self._changing:
                if self._stopped:
                    continue
                self._executing += 1
            try:
                outcome: TaskEvent | BaseException | None = perform(self._lanes[number], task)
            except BaseException as error:
                outcome = error
            if isinstance(outcome, TaskEvent):
                outcome = replace(outcome, worker=self.workers[number])
            if outcome is not None:  # as it is of a lane that was stopped
                self.outcomes.put((task, outcome))
            self._end(task, isinstance(outcome, TaskEvent))

    def _end(self, task: Task, succeeded: bool) -> None:
        with self._changing:
            self._executing -= 1
            for waiting in self._dependents.pop(task.id) if succeeded else []:
                waiting.count -= 1
                if not waiting.count:
                    self._ready[waiting.task.lane].put(waiting.task)
            self._changing.notify_all()

    def forget(self, task: Task) -> None:
        """It is forgotten as it ends."""

    def find_lost(self) -> Future[Collection[str]]:
        nobody = Future[Collection[str]]()
        nobody.set_result(())
        return nobody

    def look(
        self, pending: Mapping[str, Sequence[Task]], workers: Sequence[str]
    ) -> tuple[dict[str, Obstacle], dict[str, float]]:
        lanes = dict(zip(self.workers, self._lanes, strict=False))
        return {}, {name: clock.now() - lanes[name].stepped for name in workers if name in lanes}

    def progress(self) -> Mapping[str, LaneProgress]:
        lanes = zip(self.workers, list(self._lanes), strict=False)
        return {name: LaneProgress(name, lane.pairs, lane.stepped) for name, lane in lanes}

    def stop(self, seconds: float) -> None:
        if not self.is_here:  # a listener has forked
            return
        with self._changing:
            self._stopped = True
            for lane in self._lanes:
                lane.stop()
            if not self._changing.wait_for(lambda: not self._executing, seconds):
                logger.warning(NOT_STOPPED)

    def save(self) -> int:
        return sum(self._ask(Lane.save, SAVING_SECONDS, NOT_SAVED).values())

    def close(self, seconds: float) -> None:
        for ready in self._ready:
            for _ in range(THREADS):
                ready.put(None)
        self._ask(Lane.close, seconds, NOT_CLOSED)

    def _ask(self, function: Callable[[Lane], T], seconds: float, consequence: str) -> dict[str, T]:
        """A function's results by worker."""
        if not self.is_here:
            return {}
        calls = {name: begin_call(function, lane) for name, lane in zip(self.workers, self._lanes, strict=False)}
        return collect_answers(calls, seconds, consequence)
