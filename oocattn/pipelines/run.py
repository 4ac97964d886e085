"""The driver of a run: sends the graph to the lanes piece by piece, a bounded window at a time, and gathers events.

The window bounds what the scheduler knows of at a time, the edges of the graph bound what a lane holds (see `graph`).
"""

from __future__ import annotations

import errno
import itertools
import queue
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import cast

from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future

from oocattn.errors import IntegrityError, WorkerLostError
from oocattn.pipelines.cluster import assign_devices, worker_addresses
from oocattn.pipelines.events import Callback, Event
from oocattn.pipelines.graph import GraphBuilder, Key, attempt_of
from oocattn.pipelines.lane import Job
from oocattn.pipelines.partials import DamagedPartialError
from oocattn.pipelines.report import RunReport, Tally
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.tasks import LanePlugin, plugin_name, stop
from oocattn.planner import PIECE, UNFINISHED, WINDOW
from oocattn.plans import Plan
from oocattn.storage.dataset import Dataset
from oocattn.storage.result import ResultArrays, ResultPaths, write_json

PATIENCE = 5.0
"""Seconds without the end of a task after which it is checked whether the workers still live."""

ATTEMPTS = 3
"""Times that a subproblem is computed again because a partial of it was lost from disk."""


def run(
    plan: Plan,
    dataset: Dataset,
    fingerprint: str,
    paths: ResultPaths,
    result: ResultArrays,
    client: Client,
    callbacks: Sequence[Callback] = (),
) -> RunReport:
    """Carry a plan out on the client's workers, into the `result` that was begun at `paths`, and commit it.

    `fingerprint` is what the dataset's must still be when all is read.

    Raises what stopped it: IntegrityError where the ledger, a partial or the dataset is not what it must be, OSError as
    the file system does. Then the result has not appeared under its name.
    """
    start = time.time()
    devices = assign_devices(client, plan.device)
    addresses = list(devices)
    tally = Tally()
    unchanged = _checks_when_all_is_read(dataset, fingerprint, plan.problem.head_groups * plan.division.subproblems)
    driver = _Driver(plan, addresses, client, (tally, *callbacks, unchanged))
    job = Job(driver.name, plan, dataset, result, paths.scratch, devices)
    driver.emit(Event("started", start, start, detail={"plan": plan, "dashboard": client.dashboard_link or ""}))
    try:
        try:
            client.register_plugin(LanePlugin(job))
            driver.drive()
        except BaseException:
            driver.stop()
            raise
        finally:
            driver.close()
            client.unregister_worker_plugin(plugin_name(driver.name))
        if tally.amounts["merged"] != plan.problem.pairs:
            raise IntegrityError(
                f"{tally.amounts['merged']:,} query-key pairs were attended, expected {plan.problem.pairs:,}; the result is "
                "discarded, run again"
            )
        report = tally.report(
            seconds=time.time() - start,
            predicted_seconds=plan.seconds,
            tokens=plan.problem.tokens * plan.problem.batch,
            lanes=len(addresses),
        )
        write_json(paths.report, report.to_json())
        paths.commit()
    except BaseException as error:
        driver.emit(Event("failed", start, time.time(), detail={"error": f"{type(error).__name__}: {error}"}))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            words = "no space left for the result and its partials; make room and run again"
            raise OSError(errno.ENOSPC, words, str(paths.state)) from error
        raise
    now = time.time()
    driver.emit(Event("committed", now, now, detail={"path": str(paths.result)}))
    driver.emit(Event("ended", start, now, detail={"report": report}))
    return report


def _checks_when_all_is_read(dataset: Dataset, fingerprint: str, subproblems: int) -> Callback:
    """A listener that raises IntegrityError if the dataset has another fingerprint when all subproblems have been staged.

    It looks again whenever one is staged once more. By then the driver has little else to do.
    """
    left = subproblems

    def check(event: Event) -> None:
        nonlocal left
        if event.kind == "staged":
            left -= not event.attempt
            if left <= 0 and Dataset.open(dataset.location).fingerprint() != fingerprint:
                raise IntegrityError(
                    f"{dataset.location}: the dataset changed while the run read it; the result is discarded, run again"
                )

    return check


class _Driver:
    """One run's traffic with the scheduler."""

    def __init__(self, plan: Plan, addresses: Sequence[str], client: Client, callbacks: Sequence[Callback]) -> None:
        self.name = uuid.uuid4().hex[:8]
        self._plan = plan
        self._addresses = addresses
        self._client = client
        self._callbacks = callbacks
        self._unfinished: dict[Key, Future[Event]] = {}
        self._ended: queue.SimpleQueue[Future[Event]] = queue.SimpleQueue()
        # Of a Ctrl-C within its `sync`, distributed logs a NameError: so results are asked for by another thread.
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="oocattn-results")
        self._attending = 0
        self._recomputing: set[tuple[int, int]] = set()
        self._attempts: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._stalled: list[Key] = []

    def emit(self, event: Event) -> None:
        for callback in self._callbacks:
            callback(event)

    def drive(self) -> None:
        """Submit every piece of the graph, and see every task to its end."""
        schedule = Schedule(self._plan, len(self._addresses))
        builder = GraphBuilder(self.name, schedule, self._addresses, self._unfinished)
        order = schedule.order()
        sizes = itertools.chain([1], itertools.repeat(PIECE))  # one first: reading begins while the rest is prepared
        while True:
            while not self._recomputing and self._has_room(schedule.lanes):
                subproblems = list(itertools.islice(order, next(sizes) * schedule.lanes))
                if not subproblems:
                    break
                self._attending += len(subproblems)
                self._submit(*builder.piece(subproblems))
            if not self._unfinished:
                return
            batch = self._next_batch()
            for future in batch:
                if future.status == "error":
                    self._recompute(future, builder)
            self._done([future for future in batch if future.status == "finished"], builder)

    def _has_room(self, lanes: int) -> bool:
        """Whether another piece may be submitted: both what is to be attended and what is to be written is bounded."""
        return self._attending < WINDOW * lanes and len(self._unfinished) < UNFINISHED * lanes

    def _next_batch(self) -> list[Future[Event]]:
        """Wait for tasks to end."""
        while True:
            try:
                batch = [self._ended.get(timeout=PATIENCE)]
                while not self._ended.empty():
                    batch.append(self._ended.get())
            except queue.Empty:
                self._check_workers()
            else:
                return batch

    def _event(self, future: Future[Event]) -> Event:
        """What a finished task returned; that is gone with its worker."""
        while True:
            try:
                return self._asking.submit(future.result, timeout=PATIENCE).result()
            except TimeoutError:
                self._check_workers()

    def _check_workers(self) -> None:
        """Raise WorkerLostError when a worker is gone, for its tasks can end nowhere else."""
        lost = set(self._addresses) - set(worker_addresses(self._client))
        if lost:
            raise WorkerLostError(
                f"worker {', '.join(sorted(lost))} is gone with what it held in memory; start it and run again"
            )

    def _done(self, futures: list[Future[Event]], builder: GraphBuilder) -> None:
        """Pass on what happened, and merge anew what waited for a partial to be computed again."""
        for future in futures:
            event = self._event(future)
            del self._unfinished[cast(Key, future.key)]
            self.emit(replace(event, attempt=attempt_of(cast(Key, future.key))))
            if event.kind == "attended":
                self._attending -= 1
                self._recomputing.discard((event.head_group, event.index))
        if self._stalled and not self._recomputing:
            stalled, self._stalled = self._stalled, []
            for key in stalled:
                del self._unfinished[key]
            self._submit(*builder.chunks_again(stalled))

    def _recompute(self, future: Future[Event], builder: GraphBuilder) -> None:
        """Have a damaged partial computed again; what failed for want of it is submitted anew then. Raises other errors.

        Dask's own retry will not do: it would also repeat finished tasks whose results it has let go, such as writes.
        """
        error = future.exception()
        if not isinstance(error, DamagedPartialError):
            raise error
        self._stalled.append(cast(Key, future.key))
        work = error.head_group, error.subproblem
        if work not in self._recomputing:
            self._attempts[work] += 1
            if self._attempts[work] > ATTEMPTS:
                raise error
            now = time.time()
            self.emit(Event("failed", now, now, *work, detail={"error": str(error), "recomputed": 1}))
            self._recomputing.add(work)
            self._attending += 1
            self._submit(*builder.again(*work, self._attempts[work]))

    def _submit(self, graph: HighLevelGraph, keys: list[Key]) -> None:
        futures = self._client.get(graph, keys, sync=False)
        self._unfinished.update(zip(keys, futures, strict=True))
        for future in futures:
            future.add_done_callback(self._ended.put)

    def close(self) -> None:
        """Ask for no more results."""
        self._asking.shutdown(wait=False)

    def stop(self) -> None:
        """Let what is executing end, and let nothing else begin."""
        self._client.cancel(list(self._unfinished.values()), force=True, reason="the run has ended")
        while any(self._client.run(stop, self.name).values()):
            time.sleep(0.05)
