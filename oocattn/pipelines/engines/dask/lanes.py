"""Lanes of an attempt on a Dask cluster: a graph of tasks, futures as outcomes.

No other worker of the cluster is touched. As a run ends, a worker that fails or is silent costs what it held, never the end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future as CallFuture
from concurrent.futures import wait
from contextlib import suppress
from functools import partial

from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import Task as DaskTask
from dask.task_spec import TaskRef
from distributed import Client, Future

from oocattn.errors import WorkerLostError
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.base import SAVING_SECONDS, Lanes, Obstacle, warn_of_failure
from oocattn.pipelines.engines.dask.calls import answer, begin
from oocattn.pipelines.engines.dask.cluster import check_scheduler, living_workers, scheduler_gone
from oocattn.pipelines.engines.dask.obstacles import Inquiry
from oocattn.pipelines.engines.dask.tasks import close_lane, open_lane, perform_task, save, stop
from oocattn.pipelines.graph import Task, TaskId
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import TaskEvent

Key = tuple[str, int, int]
"""A task's key at the scheduler: layer (step, run and piece), head group, index."""

PAUSE_SECONDS = 0.05
"""Seconds between two looks at whether tasks still execute."""

logger = logging.getLogger("oocattn")


class GraphMaker:
    """Makes Dask graphs of the pieces of a run, a layer a step.

    Tasks are for the workers of its lanes. An edge to a task of an earlier graph is that task's future; one that has
    ended needs no edge. Layers, and with them the task groups of the scheduler, have the number of their piece in
    their names, so that they never form a cycle.
    """

    def __init__(self, run: str, workers: Sequence[str]) -> None:
        self._run = run
        self._workers = workers
        self._numbers = itertools.count()

    def make(
        self, pieces: Sequence[Sequence[Task]], unfinished: Mapping[TaskId, Future[TaskEvent | None]]
    ) -> tuple[HighLevelGraph, list[Key]]:
        """The graph of some pieces, and its keys; `unfinished`: futures of earlier graphs."""
        keys: dict[TaskId, Key] = {}
        for piece in pieces:
            number = next(self._numbers)
            keys.update((task.id, (f"{task.id[0]}-{self._run}-{number}", *task.id[1:])) for task in piece)
        layers: dict[str, dict[Key, DaskTask]] = {}
        dependencies: dict[str, set[str]] = {}
        workers: dict[Key, list[str]] = {}
        for task in itertools.chain.from_iterable(pieces):
            key = keys[task.id]
            name = key[0]
            inside = [keys[other] for other in task.after if other in keys]
            earlier = [unfinished[other] for other in task.after if other in unfinished]
            sent = Task(task.id, task.lane, (), task.turn, task.chunks)
            layers.setdefault(name, {})[key] = DaskTask(key, perform_task, self._run, sent, *map(TaskRef, inside), *earlier)
            dependencies.setdefault(name, set()).update(other[0] for other in inside if other[0] != name)
            workers[key] = [self._workers[task.lane]]
        annotations = {"workers": workers.__getitem__}
        graph = {name: MaterializedLayer(layer, annotations=annotations) for name, layer in layers.items()}
        return HighLevelGraph(graph, dependencies), list(keys.values())


class DaskLanes(Lanes):
    """One lane of a run on each of these workers, by address.

    `devices` says where the lane of each worker is, by `Worker.id`: one that is restarted at the same address has another.
    """

    def __init__(
        self, client: Client, run: Run, devices: Mapping[str, str], workers: Sequence[str], deadline: Deadline
    ) -> None:
        super().__init__(workers)
        self._client = client
        self._run = run
        self._devices = devices
        self._name = uuid.uuid4().hex[:8]  # of the tasks and lanes of this attempt
        self._deadline = deadline
        self._graphs = GraphMaker(self._name, self.workers)
        self._futures: dict[TaskId, Future[TaskEvent | None]] = {}
        self._inquiry = Inquiry(self._name, client)
        self._answering: list[str] = []  # as the run ends

    def open(self) -> CallFuture[None]:
        asked = (self._name, self._run, self._devices)
        return begin(self._client, lambda: self._client.run(open_lane, *asked, workers=self.workers))

    def submit(self, pieces: Sequence[Sequence[Task]]) -> None:
        graph, keys = self._graphs.make(pieces, self._futures)
        futures = self._client.get(graph, keys, sync=False)
        pairs = list(zip(itertools.chain.from_iterable(pieces), futures, strict=True))
        self._futures.update((task.id, future) for task, future in pairs)
        begin(self._client, partial(self._report_all, pairs))

    async def _report_all(self, pairs: Sequence[tuple[Task, Future[TaskEvent | None]]]) -> None:
        await asyncio.gather(*itertools.starmap(self._report, pairs))

    async def _report(self, task: Task, future: Future[TaskEvent | None]) -> None:
        """Pass on the end of a task; where its result is lost, Dask runs it again."""
        try:
            outcome: TaskEvent | BaseException | None = await self._client.gather(future, asynchronous=True)
        except (Exception, CancelledError) as error:
            outcome = error
        if outcome is None:
            outcome = WorkerLostError(f"the worker of {task.place} has no lane: it was restarted")
        self.outcomes.put((task, outcome))

    def forget(self, task: Task) -> None:
        del self._futures[task.id]

    def find_lost(self) -> CallFuture[Collection[str]]:
        async def find() -> Collection[str]:
            try:
                return set(self.workers) - set(await self._client.nthreads())
            except (OSError, RuntimeError, ValueError) as error:
                raise scheduler_gone(error) from error

        check_scheduler(self._client)
        return begin(self._client, find)

    def look(
        self, pending: Mapping[str, Sequence[Task]], workers: Sequence[str]
    ) -> tuple[dict[str, Obstacle], dict[str, float]]:
        by_key = {name: {self._futures[task.id].key: task for task in tasks} for name, tasks in pending.items()}
        return self._inquiry.look(by_key, workers)

    def stop(self, seconds: float) -> None:
        self._answering = self._living_workers(self._deadline.silence_seconds)
        if not self._answering:
            return
        with warn_of_failure("some tasks may still run"):
            futures = list(self._futures.values())
            reason = "the run has ended"
            answer(
                self._client, lambda: self._client.cancel(futures, force=True, reason=reason), self._deadline.silence_seconds
            )
        until = time.monotonic() + seconds
        while any(self._ask_stopped(stop, self._deadline.silence_seconds)):
            if time.monotonic() > until:
                logger.warning("some tasks did not stop in time; their work is not saved")
                break
            time.sleep(PAUSE_SECONDS)

    def save(self) -> int:
        return sum(self._ask_stopped(save, SAVING_SECONDS))

    def close(self, seconds: float) -> None:
        self._ask(close_lane, self._living_workers(seconds), seconds, "its lane may not be closed, and keep its memory")

    def _ask_stopped(self, function: Callable[..., object], seconds: float) -> list[int]:
        """A function's results on the workers that have answered so far."""
        consequence = "what it held in memory may be lost, and is computed again"
        found = self._ask(function, self._answering, seconds, consequence)
        self._answering = list(found)
        return list(found.values())

    def _ask(
        self, function: Callable[..., object], workers: Collection[str], seconds: float, consequence: str
    ) -> dict[str, int]:
        """A function's results by worker; one that fails or is silent is warned of."""
        answers: dict[str, CallFuture[dict[str, int]]] = {}
        for address in workers:
            answers[address] = begin(self._client, partial(self._client.run, function, self._name, workers=[address]))
        wait(answers.values(), timeout=seconds)
        found: dict[str, int] = {}
        for address, said in answers.items():
            with warn_of_failure(f"worker {address}: {consequence}"):
                found[address] = int(said.result(timeout=0)[address])
        return found

    def _living_workers(self, seconds: float) -> list[str]:
        """The workers still there; none without a scheduler, or in a fork."""
        if not self.is_here:  # a listener has forked
            return []
        with suppress(WorkerLostError):
            there = living_workers(self._client, seconds)
            return [address for address in there if address in self.workers]
        return []
