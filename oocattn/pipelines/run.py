"""The driver of a run: sends the graph to the lanes piece by piece, a bounded window at a time, and gathers events.

The window bounds what the scheduler knows of at a time, the edges of the graph bound what a lane holds (see `graph`). What
goes wrong and can be mended ends an attempt: the next one does what then is left, as a resumed run does.
"""

from __future__ import annotations

import errno
import itertools
import queue
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future

from oocattn.errors import TaintedError, WorkerLostError
from oocattn.pipelines.cluster import assign_devices, worker_addresses
from oocattn.pipelines.events import Callback, Event
from oocattn.pipelines.finished import finished_chunks, gather_checksums
from oocattn.pipelines.graph import GraphBuilder, Key
from oocattn.pipelines.interrupts import InterruptedRunError, Interrupts
from oocattn.pipelines.lane import Job
from oocattn.pipelines.partials import DamagedPartialError, partial_path, partials_on_disk
from oocattn.pipelines.report import RunReport, Tally
from oocattn.pipelines.schedule import Done, Schedule
from oocattn.pipelines.tasks import LanePlugin, plugin_name, stop
from oocattn.planner import PIECE, UNFINISHED, WINDOW
from oocattn.plans import Plan
from oocattn.storage.dataset import Dataset
from oocattn.storage.journal import Journal, Place
from oocattn.storage.result import ResultArrays, ResultPaths, write_json

PATIENCE = 5.0
"""Seconds without the end of a task after which it is checked whether the workers still live."""

ATTEMPTS = 3
"""Times that a subproblem is computed again because a partial of it was lost from disk."""


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


def run(work: Work, client: Client, callbacks: Sequence[Callback] = ()) -> RunReport:
    """Do what is left of the work on the client's workers, and commit the result.

    Raises what stopped it: IntegrityError where the ledger, a partial or the dataset is not what it must be, OSError as
    the file system does. Then the result has not appeared under its name, and what was done is in the journal; but after
    an IntegrityError that says so it is discarded. Ctrl-C or SIGTERM end it when what is in flight is on disk.
    """
    with Interrupts() as interrupts:
        return _run(work, client, callbacks, interrupts)


def _run(work: Work, client: Client, callbacks: Sequence[Callback], interrupts: Interrupts) -> RunReport:
    start = time.time()
    plan, tally = work.plan, Tally()
    before = finished_chunks(plan, work.journal)

    def emit(event: Event) -> None:
        tally(event)
        for callback in callbacks:
            callback(event)

    try:
        found = assign_devices(client, plan.device)
        devices = dict(itertools.islice(found.items(), plan.lanes))  # its memory is that of so many
        _drive(work, client, devices, emit, start, interrupts)
        finished = finished_chunks(plan, work.journal)
        _check_pairs(plan, finished)
        work.result.record(gather_checksums(plan, finished))
        report = tally.report(plan, finished, before, seconds=time.time() - start, lanes=len(devices))
        write_json(work.paths.report, report.to_json())
        work.paths.commit()
    except BaseException as error:
        emit(Event("failed", start, time.time(), detail={"error": f"{type(error).__name__}: {error}"}))
        if isinstance(error, TaintedError):
            work.paths.discard()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            words = "no space left for the result and its partials; make room and resume"
            raise OSError(errno.ENOSPC, words, str(work.paths.state)) from error
        raise
    now = time.time()
    emit(Event("committed", now, now, detail={"path": str(work.paths.result)}))
    emit(Event("ended", start, now, detail={"report": report}))
    return report


def _check_pairs(plan: Plan, finished: Mapping[Place, Mapping[str, Any]]) -> None:
    pairs = sum(record["pairs"] for record in finished.values())
    if pairs != plan.problem.pairs:
        raise TaintedError(
            f"{pairs:,} query-key pairs were attended, expected {plan.problem.pairs:,}; the result is discarded, run again"
        )


def _drive(
    work: Work, client: Client, devices: Mapping[str, str], emit: Callback, start: float, interrupts: Interrupts
) -> None:
    """Attempt to do what is left until nothing is: a damaged partial ends an attempt, and the next one computes it again."""
    damaged: DamagedPartialError | None = None
    attempts: Counter[tuple[int, int]] = Counter()
    while True:
        schedule = Schedule(work.plan, len(devices), _done(work))
        left = sum(1 for _ in schedule.order())
        if damaged is None:
            detail = {"plan": work.plan, "dashboard": client.dashboard_link or "", "left": left}
            emit(Event("started", start, start, detail=detail))
        else:
            now = time.time()
            detail = {"error": str(damaged), "recomputed": 1, "left": left}
            emit(Event("failed", now, now, damaged.head_group, damaged.subproblem, detail=detail))
        try:
            attempt = _Attempt(work, client, devices, schedule, left, emit)
            interrupts.tell = attempt.interrupt
            if interrupts.asked:
                attempt.interrupt()
            attempt.drive()
        except DamagedPartialError as error:
            damaged = error
            attempts[error.head_group, error.subproblem] += 1
            if attempts[error.head_group, error.subproblem] > ATTEMPTS:
                raise
        else:
            return


def _done(work: Work) -> Done:
    """What need not be done: partials of chunks that are written are removed."""
    chunks = finished_chunks(work.plan, work.journal).keys()
    partials = partials_on_disk(work.paths.scratch)
    for partial in [partial for partial in partials if partial[:2] in chunks]:
        partial_path(work.paths.scratch, partial).unlink()
        partials.remove(partial)
    return Done(chunks, partials)


class _Attempt:
    """What is left of a run, from the making of its lanes to their end."""

    def __init__(
        self,
        work: Work,
        client: Client,
        devices: Mapping[str, str],
        schedule: Schedule,
        left: int,
        emit: Callback,
    ) -> None:
        self._name = uuid.uuid4().hex[:8]
        self._work = work
        self._client = client
        self._devices = devices
        self._schedule = schedule
        self._left = left  # to be staged
        self._emit = emit
        self._unfinished: dict[Key, Future[Event]] = {}
        self._ended: queue.SimpleQueue[Future[Event] | None] = queue.SimpleQueue()
        self._attending = 0

    def interrupt(self) -> None:
        """Stop at the next step; to be called from anywhere."""
        self._ended.put(None)

    def drive(self) -> None:
        """Make the lanes, see every task to its end, and close the lanes, however it ends."""
        work = self._work
        job = Job(self._name, work.plan, work.dataset, work.result, work.journal, work.paths.scratch, self._devices)
        try:
            self._client.register_plugin(LanePlugin(job))
            self._see_to_the_end()
        except BaseException:
            self._stop()
            raise
        finally:
            self._client.unregister_worker_plugin(plugin_name(self._name))

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

    def _next_batch(self) -> list[Future[Event]]:
        """Wait for tasks to end. Raises InterruptedRunError when that is asked for."""
        batch: list[Future[Event]] = []
        while not batch or not self._ended.empty():
            try:
                future = self._ended.get(timeout=PATIENCE)
            except queue.Empty:
                self._check_workers()
                continue
            if future is None:
                raise InterruptedRunError("interrupted: what was in flight is on disk")
            batch.append(future)
        return batch

    def _event(self, future: Future[Event]) -> Event:
        """What a finished task returned; that is gone with its worker."""
        while True:
            try:
                return future.result(timeout=PATIENCE)
            except TimeoutError:
                self._check_workers()

    def _check_workers(self) -> None:
        """Raise WorkerLostError when a worker is gone, for its tasks can end nowhere else."""
        lost = self._devices.keys() - worker_addresses(self._client)
        if lost:
            raise WorkerLostError(
                f"worker {', '.join(sorted(lost))} is gone with what it held in memory; start it and resume"
            )

    def _finish(self, future: Future[Event]) -> None:
        """Pass on what a task did, or raise its error."""
        if future.status == "error":
            raise cast(BaseException, future.exception())
        event = self._event(future)
        del self._unfinished[cast(Key, future.key)]
        self._emit(event)
        if event.kind == "attended":
            self._attending -= 1
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

    def _stop(self) -> None:
        """Let what is executing end, and let nothing else begin."""
        self._client.cancel(list(self._unfinished.values()), force=True, reason="the run has ended")
        while any(self._client.run(stop, self._name).values()):
            time.sleep(0.05)
