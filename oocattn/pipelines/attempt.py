"""One attempt at what is left of a run: lanes are made, the graph is sent to them a bounded window at a time, lanes close.

The window bounds what the scheduler knows of at a time, the edges of the graph bound what a lane holds (see `graph`). An
attempt ends with the first thing that goes wrong, and then what is in flight is on disk; what comes of that is `run`'s.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future

from oocattn.errors import OocattnError, TaintedError, TimeLimitError, WorkerLostError
from oocattn.pipelines.cluster import living_workers
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.events import Callback, Event
from oocattn.pipelines.graph import GraphBuilder, Key
from oocattn.pipelines.interrupts import InterruptedRunError
from oocattn.pipelines.lane import Job
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.tasks import LanePlugin, plugin_name, save, stop
from oocattn.planner import PIECE, UNFINISHED, WINDOW
from oocattn.plans import Plan
from oocattn.storage.dataset import Dataset
from oocattn.storage.journal import Journal
from oocattn.storage.result import ResultArrays, ResultPaths

PATIENCE = 5.0
"""Seconds after which it is checked again whether the workers still live."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Work:
    """What a run works at: a plan over a dataset, whose `fingerprint` must still be the same when all is read, into a result
    that grows at `paths`, and the journal of what is done."""

    plan: Plan
    dataset: Dataset
    fingerprint: str
    paths: ResultPaths
    result: ResultArrays
    journal: Journal


class Attempt:
    """What is left of a run, from the making of its lanes to their end.

    `devices` says where the lane of each worker is, `left` how many subproblems are to be staged.
    """

    def __init__(
        self,
        work: Work,
        client: Client,
        devices: Mapping[str, str],
        schedule: Schedule,
        left: int,
        emit: Callback,
        deadline: Deadline,
    ) -> None:
        self._name = uuid.uuid4().hex[:8]
        self._work = work
        self._client = client
        self._devices = devices
        self._schedule = schedule
        self._left = left
        self._emit = emit
        self._deadline = deadline
        self._unfinished: dict[Key, Future[Event | None]] = {}
        self._ended: queue.SimpleQueue[Future[Event | None] | None] = queue.SimpleQueue()
        self._attending = 0
        self._checked = time.monotonic()

    def interrupt(self) -> None:
        """Stop at the next step; to be called from anywhere."""
        self._ended.put(None)

    def drive(self) -> None:
        """Make the lanes, see every task to its end, and close the lanes, however it ends.

        Raises what ended it, WorkerLostError where a worker or the scheduler is gone among it; but for a TaintedError, what
        the lanes have done is on disk then.
        """
        work = self._work
        job = Job(self._name, work.plan, work.dataset, work.result, work.journal, work.paths.scratch, self._devices)
        with self._missing_those_who_left():
            try:
                self._client.register_plugin(LanePlugin(job))
                self._see_to_the_end()
            except BaseException as error:
                self._stop(keep=not isinstance(error, TaintedError))
                raise
            finally:
                self._close_lanes()

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

    def _next_batch(self) -> list[Future[Event | None]]:
        """Wait for tasks to end. Raises InterruptedRunError when that is asked for, TimeLimitError when it is time."""
        batch: list[Future[Event | None]] = []
        while not batch or not self._ended.empty():
            if self._deadline.left <= 0:
                raise TimeLimitError(f"{self._work.paths.result}: the time limit is reached; what was done can be resumed")
            if time.monotonic() - self._checked > PATIENCE:
                self._check_workers()
            try:
                future = self._ended.get(timeout=min(PATIENCE, self._deadline.left))
            except queue.Empty:
                continue
            if future is None:
                raise InterruptedRunError("interrupted: what was in flight is on disk")
            batch.append(future)
        return batch

    def _event(self, future: Future[Event | None]) -> Event:
        """What a finished task returned; that is gone with its worker."""
        while True:
            try:
                event = future.result(timeout=PATIENCE)
            except TimeoutError:
                self._check_workers()
                continue
            if event is None:
                raise WorkerLostError(f"the worker of task {future.key} has no lane: it has begun anew")
            return event

    def _check_workers(self) -> None:
        """Raise WorkerLostError when a worker is gone, for its tasks can end nowhere else."""
        lost = self._devices.keys() - living_workers(self._client)
        if lost:
            raise WorkerLostError(f"worker {', '.join(sorted(lost))} is gone with what it held in memory")
        self._checked = time.monotonic()

    def _finish(self, future: Future[Event | None]) -> None:
        """Pass on what a task did, or raise its error."""
        if future.status != "finished":
            self._check_workers()
            raise cast(BaseException, future.exception())
        event = self._event(future)
        del self._unfinished[cast(Key, future.key)]
        self._emit(event)
        if event.kind == "attended":
            self._attending -= 1
            self._deadline.learn(event.stop - event.start)
        elif event.kind == "staged":
            self._left -= 1
            if not self._left:  # all is read, and the driver has little else to do
                self._check_dataset()

    def _check_dataset(self) -> None:
        dataset = self._work.dataset
        if Dataset.open(dataset.location).fingerprint() != self._work.fingerprint:
            raise TaintedError(
                f"{dataset.location}: the dataset changed while the run read it; the result is discarded, run again"
            )

    def _submit(self, graph: HighLevelGraph, keys: list[Key]) -> None:
        futures = self._client.get(graph, keys, sync=False)
        self._unfinished.update(zip(keys, futures, strict=True))
        for future in futures:
            future.add_done_callback(self._ended.put)

    def _stop(self, keep: bool) -> None:
        """Let what is executing end, let nothing else begin, and have what lanes hold in memory on disk, if it is to be
        kept.

        Whatever fails here costs no more than that work: what ended the attempt is what is told.
        """
        start = time.time()
        try:
            living_workers(self._client)
            self._client.cancel(list(self._unfinished.values()), force=True, reason="the run has ended")
            while any(self._client.run(stop, self._name, on_error="ignore").values()):
                time.sleep(0.05)
            saved = list(self._client.run(save, self._name, on_error="return").values()) if keep else []
        except Exception as error:
            saved = [error]
        for failed in (one for one in saved if isinstance(one, BaseException)):
            logger.warning("what a lane held in memory may be lost, and is computed again: %s", failed)
        if written := sum(one for one in saved if isinstance(one, int)):
            self._emit(Event("saved", start, time.time(), amount=written))

    def _close_lanes(self) -> None:
        """Close the lanes of all workers that are still there; those of the others are gone with them."""
        try:
            living_workers(self._client)
            self._client.unregister_worker_plugin(plugin_name(self._name))
        except Exception as error:
            logger.warning("not every worker has closed its lane: %s", error)
