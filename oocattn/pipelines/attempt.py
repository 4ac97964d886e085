"""One attempt at what is left of a run: lanes are opened, the graph is sent to them a bounded window at a time, lanes close.

The window bounds what the scheduler knows of at a time, the edges of the graph bound what a lane holds (see `graph`). An
attempt ends with the first thing that goes wrong, and then what is in flight is on disk; what comes of that is `run`'s.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
import uuid
from asyncio import CancelledError
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, cast

from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future

from oocattn import clock
from oocattn.errors import OocattnError, StalledError, TaintedError, TaskError, TimeLimitError, WorkerLostError
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.dask.cluster import begin_call, living_workers
from oocattn.pipelines.engines.dask.lanes import Lanes
from oocattn.pipelines.engines.dask.standstill import Standstill
from oocattn.pipelines.failing import SET_UP, naming, place_of
from oocattn.pipelines.graph import GraphBuilder, Key
from oocattn.pipelines.lane.lane import Job
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.signals import InterruptedRunError
from oocattn.pipelines.watch.events import Attended, Callback, Saved, Staged, TaskEvent
from oocattn.pipelines.work import Work
from oocattn.planning.cost import PIECE, UNFINISHED, WINDOW
from oocattn.storage.files.operations import described, is_disk_full
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.units import format_seconds

PATIENCE = 5.0
"""Seconds after which it is checked again whether the workers still live."""

logger = logging.getLogger("oocattn")


class Attempt:
    """What is left of a run, from the opening of its lanes to their end.

    `devices` says where the lane of each worker is, by address, `ids` its `Worker.id`, `left` how many subproblems are to be
    staged.
    """

    def __init__(
        self,
        work: Work,
        client: Client,
        devices: Mapping[str, str],
        ids: Mapping[str, str],
        schedule: Schedule,
        left: int,
        emit: Callback,
        deadline: Deadline,
    ) -> None:
        self._name = uuid.uuid4().hex[:8]
        self._work = work
        self._client = client
        self._devices = devices
        by_id = {ids[address]: device for address, device in devices.items()}
        job = Job(self._name, work.plan, work.dataset, work.result, work.journal, work.paths.scratch, by_id)
        self._lanes = Lanes(client, job, devices.keys(), deadline)
        self._schedule = schedule
        self._left = self._to_attend = left
        self._emit = emit
        self._deadline = deadline
        self._unfinished: dict[Key, Future[TaskEvent | None]] = {}
        self._ended: queue.SimpleQueue[Future[TaskEvent | None] | None] = queue.SimpleQueue()
        self._attending = self._attended = 0
        self._checked = time.monotonic()
        self._standstill = Standstill(self._name, client, devices, self._pending, emit, deadline)
        self._interrupted = False
        self.dataset_checked = False
        """Whether the dataset was found unchanged after all of it was read."""

    def interrupt(self) -> None:
        """Stop at the next step; to be called from anywhere."""
        self._interrupted = True
        self._ended.put(None)

    def drive(self) -> None:
        """Open the lanes, see every task to its end, and close the lanes, however it ends.

        Raises what ended it, WorkerLostError where a worker or the scheduler is gone among it; but for a TaintedError, what
        the lanes have done is on disk then.
        """
        with self._missing_those_who_left():
            try:
                self._open_lanes()
                self._see_to_the_end()
            except BaseException as error:
                self._stop(error)
                raise
            finally:
                self._lanes.close()

    def _open_lanes(self) -> None:
        with naming(SET_UP), self._missing_those_who_left():
            self._call(self._lanes.open)
        self._standstill.begin()

    def _stop(self, error: BaseException) -> None:
        """Let what is executing end, and have what lanes hold in memory on disk, unless the error says that it is wrong."""
        start = clock.now()
        patience = self._deadline.silence if isinstance(error, StalledError) else self._deadline.patience
        self._lanes.stop(list(self._unfinished.values()), patience)
        saved = 0 if isinstance(error, TaintedError) else self._lanes.save()
        if saved:
            self._emit(Saved(start=start, stop=clock.now(), bytes=saved))

    @contextmanager
    def _missing_those_who_left(self) -> Iterator[None]:
        """What fails because a worker or the scheduler is gone is told as that."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # among them distributed's own of connections that broke
            if not isinstance(error, OocattnError):
                self._check_workers()
            raise

    def _see_to_the_end(self) -> None:
        """Submit every piece of the graph, and see every task to its end."""
        schedule = self._schedule
        builder = GraphBuilder(self._name, schedule, list(self._devices), self._unfinished)
        order, complete = schedule.order(), list(schedule.complete())
        sizes = itertools.chain([1], itertools.repeat(PIECE))  # one first: reading begins while the rest is prepared
        while True:
            while self._has_room():
                subproblems = list(itertools.islice(order, next(sizes) * schedule.lanes))
                if not subproblems and not complete:
                    break
                self._attending += len(subproblems)
                self._submit(*builder.piece(subproblems, complete))
                complete = []
            if not self._unfinished:
                return
            for future in self._next_batch():
                self._finish(future)

    def _has_room(self) -> bool:
        """Whether another piece may be submitted: both what is to be attended and what is to be written is bounded."""
        lanes = self._schedule.lanes
        return self._attending < WINDOW * lanes and len(self._unfinished) < UNFINISHED * lanes

    def _next_batch(self) -> list[Future[TaskEvent | None]]:
        """Wait for tasks to end. Raises InterruptedRunError when that is asked for, TimeLimitError when it is time, and
        StalledError when none ends."""
        batch: list[Future[TaskEvent | None]] = []
        while not batch or not self._ended.empty():
            patience = self._check_time()
            if time.monotonic() - self._checked > PATIENCE:
                self._check_workers()
            with self._waiting(patience), suppress(queue.Empty):
                future = self._ended.get(timeout=patience)
                if future is not None:
                    batch.append(future)
        return batch

    @contextmanager
    def _waiting(self, most: float) -> Iterator[None]:
        """What is inside waits for tasks or workers. Raises StalledError where nothing has ended for too long.

        No more than `most` seconds are counted: the clock goes on while this process is stopped.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self._standstill.add(min(most, time.monotonic() - began))

    def _pending(self) -> dict[str, list[Key]]:
        """The unfinished tasks of each worker."""
        pending: defaultdict[str, list[Key]] = defaultdict(list)
        for key in list(self._unfinished):
            pending[self._worker_of(key)].append(key)
        return pending

    def _worker_of(self, key: Key) -> str:
        layer, head_group, index = key
        of_subproblem = layer.startswith(("stage", "attend"))
        lane_of = self._schedule.subproblem_lane if of_subproblem else self._schedule.chunk_lane
        return list(self._devices)[lane_of(head_group, index)]

    def _check_time(self) -> float:
        """Seconds until it is to be asked again. Raises InterruptedRunError when that was asked for, TimeLimitError when it
        is time."""
        left = self._deadline.left
        if self._interrupted:
            logger.warning(
                "ending: what is in flight is finished and saved first, which may take %s; a second signal ends at once",
                format_seconds(self._deadline.in_flight),
            )
            raise InterruptedRunError("interrupted: what was in flight is on disk")
        if left <= 0:
            plan = self._work.plan
            words = (
                f"time limit reached: {plan.subproblems - self._to_attend:,} of {plan.subproblems:,} subproblems are done, "
                "not counting those in flight"
            )
            if not self._attended:
                words += f", none of them since the start: one takes about {format_seconds(plan.subproblem_seconds)}"
                words += f", so allow {format_seconds(self._deadline.least)} and what it takes to start"
            raise TimeLimitError(words)
        return min(PATIENCE, left)

    def _event(self, future: Future[TaskEvent | None]) -> TaskEvent:
        """What a finished task returned; that is gone with its worker, and then Dask runs the task again."""
        while True:
            patience = self._check_time()
            try:
                with self._waiting(patience):
                    event = future.result(timeout=patience)
            except TimeoutError:
                self._check_workers()
                continue
            except (Exception, CancelledError) as error:
                self._raise(future, error)
            if event is None:
                raise WorkerLostError(f"the worker of {place_of(cast(Key, future.key))} has no lane: it was restarted")
            return event

    def _check_workers(self) -> None:
        """Raise WorkerLostError when a worker is gone, for its tasks can end nowhere else."""
        lost = self._devices.keys() - self._call(lambda: living_workers(self._client, patience=None))
        if lost:
            raise WorkerLostError(f"worker {', '.join(sorted(lost))} is gone with what it held in memory")
        self._checked = time.monotonic()

    def _call(self, function: Callable[[], Any]) -> Any:
        """What a call that waits for workers or the scheduler returns. They may hang: raises as `_check_time` and
        `_waiting` meanwhile."""
        called = begin_call(function)
        while not called.done():
            patience = self._check_time()
            with self._waiting(patience):
                wait([called], timeout=patience)
        return called.result()

    def _raise(self, future: Future[TaskEvent | None], error: BaseException) -> NoReturn:
        """Raise a task's error as it is told; WorkerLostError where a worker is gone, for that explains it."""
        self._check_workers()
        if isinstance(error, OocattnError) or is_disk_full(error) or not isinstance(error, Exception):
            raise error
        # Dask ran a task again whose result was lost with a worker: the lane has what it needs no more.
        raise TaskError(place_of(cast(Key, future.key)), described(error)) from error

    def _finish(self, future: Future[TaskEvent | None]) -> None:
        """Pass on what a task did, or raise its error."""
        if future.status != "finished":
            self._check_workers()
            self._raise(future, cast(BaseException, future.exception()))
        event = self._event(future)
        key = cast(Key, future.key)
        self._standstill.progress(self._worker_of(key))
        del self._unfinished[key]
        self._emit(event)
        self._deadline.learn(event)
        if isinstance(event, Attended):
            self._attending -= 1
            self._attended += 1
            self._to_attend -= 1
        elif isinstance(event, Staged):
            self._left -= 1
            if not self._left:  # all is read, and the driver has little else to do
                self.check_dataset()

    def check_dataset(self) -> None:
        """Raises TaintedError where the dataset is not what it was when the run began."""
        dataset = self._work.dataset
        with naming("the check of the dataset"):
            changed = changed_arrays(self._work.fingerprint, dataset.reopened().fingerprint(within_run=True))
        if changed:
            raise TaintedError(
                f"{dataset.location}: {changed} of the dataset changed while the run read it; the result is discarded, run "
                "again"
            )
        self.dataset_checked = True

    def _submit(self, graph: HighLevelGraph, keys: list[Key]) -> None:
        with naming("the submission of tasks"), self._missing_those_who_left():
            futures = self._client.get(graph, keys, sync=False)
        self._unfinished.update(zip(keys, futures, strict=True))
        for future in futures:
            future.add_done_callback(self._ended.put)
