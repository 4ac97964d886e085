"""The Dask engine: workers that take part in a run, and their lanes: graphs of tasks, futures as outcomes.

No other worker of the cluster is touched. As a run ends, a worker that fails or is silent costs what it held, never the end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future as CallFuture
from contextlib import contextmanager, suppress
from dataclasses import replace

from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import Task as DaskTask
from dask.task_spec import TaskRef
from distributed import Client, Future

from oocattn.errors import WorkerLostError
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
    warn_of_failure,
)
from oocattn.pipelines.engines.dask.beats import LaneBeats, ignore_beat
from oocattn.pipelines.engines.dask.cluster import (
    answer,
    assign_devices,
    await_answers,
    begin,
    begin_on,
    check_scheduler,
    is_in_process,
    keeping_workers,
    living_workers,
    room_on,
    scheduler_gone,
    wait_for_others,
    wait_for_workers,
    warn_of_open_ports,
)
from oocattn.pipelines.engines.dask.enlisting import Roll, enlist, enlist_again
from oocattn.pipelines.engines.dask.lane_plugin import plugin_name
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.engines.dask.obstacles import Inquiry
from oocattn.pipelines.engines.dask.readiness import Expectations
from oocattn.pipelines.engines.dask.run_at_scheduler import follow_run, leave_run
from oocattn.pipelines.engines.dask.runs import PAGE, Record, shown
from oocattn.pipelines.engines.dask.tasks import close_lane, open_lane, perform_task, save, stop
from oocattn.pipelines.graph import Task, TaskId
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.planning.machine import MAX_LANES
from oocattn.planning.plan import Plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.growing import RunState
from oocattn.units import format_seconds

Key = tuple[str, int, int]
"""A task's key at the scheduler: group (step and run), head group, index."""

PAUSE_SECONDS = 0.05  # between two looks at whether tasks still execute
IMPORT = "__import__('oocattn.pipelines.engines.dask.readiness')"
"""What a worker that has joined evaluates before lanes stop for it: PyTorch takes seconds."""

REPLACEMENT_SECONDS, LAST_REPLACEMENT_SECONDS = 10.0, 120.0  # for a dead worker's, and the last one's: a nanny takes some

logger = logging.getLogger("oocattn")


class GraphMaker:
    """Makes Dask graphs of the pieces of a run, a layer a step, with tasks for the workers of its lanes.

    Layers have the number of their piece in their names, so that they never form a cycle. The scheduler's task groups, named
    by the keys, are one a step (see `groups`).
    """

    def __init__(self, run: str, workers: Sequence[str]) -> None:
        self._run = run
        self._workers = workers
        self._numbers = itertools.count()

    def make(
        self, pieces: Sequence[Sequence[Task]], unfinished: Mapping[TaskId, Future[TaskEvent | None]]
    ) -> tuple[HighLevelGraph, list[Key]]:
        """The graph of some pieces, and its keys. An edge to a task of an earlier graph is its `unfinished` future."""
        keys: dict[TaskId, Key] = {}
        layer_of: dict[Key, str] = {}
        for piece in pieces:
            number = next(self._numbers)
            for task in piece:
                keys[task.id] = key = (f"{task.id[0]}-{self._run}", *task.id[1:])
                layer_of[key] = f"{key[0]}-{number}"
        layers: dict[str, dict[Key, DaskTask]] = {}
        dependencies: dict[str, set[str]] = {}
        workers: dict[Key, list[str]] = {}
        for task in itertools.chain.from_iterable(pieces):
            key = keys[task.id]
            name = layer_of[key]
            inside = [keys[other] for other in task.after if other in keys]
            earlier = [unfinished[other] for other in task.after if other in unfinished]
            sent = Task(task.id, task.lane, (), task.turn, task.chunks)
            layers.setdefault(name, {})[key] = DaskTask(key, perform_task, self._run, sent, *map(TaskRef, inside), *earlier)
            dependencies.setdefault(name, set()).update({layer_of[other] for other in inside} - {name})
            workers[key] = [self._workers[task.lane]]
        annotations = {"workers": workers.__getitem__}
        graph = {name: MaterializedLayer(layer, annotations=annotations) for name, layer in layers.items()}
        return HighLevelGraph(graph, dependencies), list(keys.values())


class DaskLanes(Lanes):
    """One lane of a run on each of these workers (addresses); `devices` has the device of each by `Worker.id`, which is
    another where one is restarted. `asked` has all workers that were asked whether they are ready."""

    def __init__(
        self,
        client: Client,
        run: Run,
        devices: Mapping[str, str],
        workers: Sequence[str],
        deadline: Deadline,
        asked: Collection[str],
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
        self._stopping: list[str] = []  # as the run ends
        self._silent: set[str] = set()  # those that did not answer then
        self._beats = LaneBeats()
        self._asked = asked
        self._joined: Collection[str] = ()
        self._importing: dict[str, asyncio.Future[object]] = {}  # by worker that has joined

    @property
    def in_process(self) -> bool:
        return all(map(is_in_process, self.workers))

    def open(self) -> CallFuture[None]:
        self._client.subscribe_topic(plugin_name(self._name), self._beats)
        asked = (self._name, self._run, self._devices)

        async def open_lanes() -> None:
            try:
                await self._client.run_on_scheduler(follow_run, self._name, self._client.id)
            except Exception as error:  # whatever a scheduler that lacks oocattn raises: the run does without
                words = "lanes stay on workers where a driver dies, and Dask's page of task groups may be wrong: %s"
                logger.info(words, error)
            await self._client.run(open_lane, *asked, workers=self.workers)

        return begin(self._client, open_lanes)

    def submit(self, pieces: Sequence[Sequence[Task]]) -> None:
        graph, keys = self._graphs.make(pieces, self._futures)
        futures = self._client.get(graph, keys, sync=False)
        pairs = list(zip(itertools.chain.from_iterable(pieces), futures, strict=True))
        self._futures.update((task.id, future) for task, future in pairs)
        begin(self._client, lambda: asyncio.gather(*itertools.starmap(self._report, pairs)))

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
                there = set(await self._client.nthreads())
            except (OSError, RuntimeError, ValueError) as error:
                raise scheduler_gone(error) from error
            has_room = room_on(self.workers, self._run.plan.most_sharing_lanes)
            joined = set(filter(has_room, sorted(there - set(self._asked))))
            for address in joined - self._importing.keys():
                asked = self._client.run(eval, IMPORT, workers=[address], on_error="return")
                self._importing[address] = asyncio.ensure_future(asked)
            self._joined = {address for address in joined if self._importing[address].done()}
            return set(self.workers) - there

        check_scheduler(self._client)
        return begin(self._client, find)

    def look(
        self, pending: Mapping[str, Sequence[Task]], workers: Sequence[str]
    ) -> tuple[dict[str, Obstacle], dict[str, float]]:
        by_key = {name: {self._futures[task.id].key: task for task in tasks} for name, tasks in pending.items()}
        return self._inquiry.look(by_key, workers)

    def progress(self) -> Mapping[str, LaneProgress]:
        return dict(self._beats.progress)

    def leaving(self) -> Collection[str]:
        return self._beats.leaving & set(self.workers)

    def joined(self) -> Collection[str]:
        return self._joined

    def silent(self) -> Collection[str]:
        return self._beats.silent()

    def stop(self, seconds: float) -> None:
        silence = self._deadline.silence_seconds
        self._stopping = self._living_workers(silence)
        if not self._stopping:
            return
        with warn_of_failure("some tasks may still run"):
            futures = list(self._futures.values())
            answer(self._client, lambda: self._client.cancel(futures, force=True, reason="the run has ended"), silence)
        until = time.monotonic() + seconds
        while any(self._ask_again(stop, silence)):
            if time.monotonic() > until:
                logger.warning(NOT_STOPPED)
                break
            time.sleep(PAUSE_SECONDS)

    def save(self) -> int:
        return sum(self._ask_again(save, SAVING_SECONDS))

    def close(self, seconds: float) -> None:
        workers = self._living_workers(seconds)
        self._ask(close_lane, workers, seconds, NOT_CLOSED)
        topic = plugin_name(self._name)
        if self.is_here:
            try:  # it forgets the topic, too, which to unsubscribe would begin again (distributed 2026.8)
                check_scheduler(self._client)
                answer(self._client, lambda: self._client.run_on_scheduler(leave_run, self._name), seconds)
            except Exception:  # the scheduler is gone, or silent, or lacks oocattn
                with suppress(Exception):  # the client is closed
                    self._client.unsubscribe_topic(topic)
        handlers = vars(self._client).get("_event_handlers", {})
        if topic in handlers:  # which Dask keeps; without one it would log each beat that comes late
            handlers[topic] = ignore_beat

    def _ask_again(self, function: Callable[..., object], seconds: float) -> list[int]:
        """A function's results on the workers that have answered so far."""
        answering = [address for address in self._stopping if address not in self._silent]
        return self._ask(function, answering, seconds, NOT_SAVED)

    def _ask(self, function: Callable[..., object], workers: Collection[str], seconds: float, consequence: str) -> list[int]:
        """A function's results; a worker that was silent before is told, but not waited for."""
        calls: dict[str, CallFuture[int]] = {
            address: begin_on(self._client, address, function, self._name) for address in workers
        }
        expected_calls = {address: call for address, call in calls.items() if address not in self._silent}
        await_answers(self._client, expected_calls, seconds)
        found = collect_answers(expected_calls, 0.0, consequence)
        self._silent |= calls.keys() - found.keys()
        return list(found.values())

    def _living_workers(self, seconds: float) -> list[str]:
        """The workers still there; none without a scheduler, or in a fork."""
        if not self.is_here:  # a listener has forked
            return []
        with suppress(WorkerLostError):
            there = living_workers(self._client, seconds)
            return [address for address in there if address in self.workers]
        return []


class DaskEngine(Engine):
    """Workers of a client that are ready, on each machine at most as many as the plan's budgets are for."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ids: dict[str, str] = {}
        self._asked: Collection[str] = ()
        self._devices: dict[str, str] = {}
        self.dashboard = client.dashboard_link or ""

    def enlist(self, plan: Plan, dataset: Dataset, state: RunState, check: Check) -> Mapping[str, str]:
        expected = Expectations.of_run(plan, dataset, state)
        roll = enlist(self._client, expected, check)
        self._plan, self._expected = plan, replace(expected, computing=roll.computing)
        self._take(roll, check)
        warn_of_open_ports(self._client, check)
        return roll.computing

    def replenish(self, check: Check, *, replacements: bool = True) -> None:
        count = self.lane_count if replacements else 1
        with keeping_workers(self._client, check) as keep:
            if not wait_for_workers(self._client, count, REPLACEMENT_SECONDS, LAST_REPLACEMENT_SECONDS, keep):
                raise WorkerLostError("all workers are gone with what they held in memory; start some and resume")
            roll = enlist_again(self._client, self._expected, keep)
            if roll.have_left:
                seconds = LAST_REPLACEMENT_SECONDS
                logger.warning("the last workers have left: waiting for others, %s at most", format_seconds(seconds))
                wait_for_others(self._client, roll.asked, seconds, keep)
                roll = enlist_again(self._client, self._expected, keep)
            self._take(roll, keep)

    def _take(self, roll: Roll, check: Check) -> None:
        """Have the ready ones of these workers take part; WorkerLostError where none is left."""
        ids, self._asked = roll.ids, roll.asked
        devices = assign_devices(self._client, self._plan.device, ids, check)
        fitting = list(filter(room_on((), self._plan.most_sharing_lanes), devices))[:MAX_LANES]
        self._ids, self._devices = ids, {address: devices[address] for address in fitting}
        self.lane_count = len(self._devices)
        self.in_process = all(map(is_in_process, self._devices))
        if not self._devices:
            raise WorkerLostError("no worker is ready to continue: the work that was done is on disk; start some and resume")

    @contextmanager
    def show(self, record: Callable[[], Record]) -> Iterator[None]:
        with shown(self._client, record) as taken:
            if taken and self.dashboard.endswith("/status"):
                self.dashboard = f"{self.dashboard.removesuffix('status')}{PAGE}"
            yield

    def lanes(self, run: Run, deadline: Deadline) -> DaskLanes:
        devices = {self._ids[address]: device for address, device in self._devices.items()}
        return DaskLanes(self._client, run, devices, list(self._devices), deadline, self._asked)


@contextmanager
def local_engine(dashboard_address: str, workers: int) -> Iterator[DaskEngine]:
    """The engine of a new cluster in this process (see `local_client`)."""
    with local_client(dashboard_address, workers) as client:
        yield DaskEngine(client)
