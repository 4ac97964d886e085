"""The driver of a run: sends the graph to the lanes piece by piece, a bounded window at a time, and gathers events.

The window bounds what the scheduler knows of at a time, the edges of the graph bound what a lane holds (see `graph`).
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence

from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future, as_completed, wait

from oocattn.errors import IntegrityError
from oocattn.pipelines.cluster import worker_addresses
from oocattn.pipelines.events import Callback, Event
from oocattn.pipelines.graph import GraphBuilder, Key
from oocattn.pipelines.lane import Job
from oocattn.pipelines.report import RunReport, Tally
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.tasks import LanePlugin, plugin_name, stop
from oocattn.plan import Plan
from oocattn.storage.dataset import Dataset
from oocattn.storage.result import ResultPaths

PIECE = 16
"""Subproblems of a lane that are submitted together."""

WINDOW = 32
"""Subproblems of a lane that the scheduler may know of before more are submitted: enough to hide a round trip."""


def run(plan: Plan, dataset: Dataset, paths: ResultPaths, client: Client, callbacks: Sequence[Callback] = ()) -> RunReport:
    """Carry a plan out on the client's workers, into the result that was begun at `paths`, and commit it.

    Raises what stopped it: IntegrityError where the ledger, a partial or the dataset is not what it must be, OSError as
    the file system does. Then the result has not appeared under its name.
    """
    start = time.time()
    addresses = worker_addresses(client)
    tally = Tally()
    driver = _Driver(plan, addresses, client, (tally, *callbacks))
    job = Job(driver.name, plan, dataset.location, paths.growing, paths.scratch)
    fingerprint = dataset.fingerprint()
    driver.emit(Event("started", start, start, detail={"plan": plan, "dashboard": client.dashboard_link}))
    try:
        client.register_plugin(LanePlugin(job))
        try:
            driver.drive()
        finally:
            driver.stop()
        if Dataset.open(dataset.location).fingerprint() != fingerprint:
            raise IntegrityError(
                f"{dataset.location}: the dataset changed while the run read it; the result is discarded, run again"
            )
        paths.commit()
    except BaseException as error:
        driver.emit(Event("failed", start, time.time(), detail={"error": f"{type(error).__name__}: {error}"}))
        raise
    now = time.time()
    driver.emit(Event("committed", now, now, detail={"path": str(paths.result)}))
    report = tally.report(
        seconds=now - start,
        predicted_seconds=plan.seconds,
        tokens=plan.problem.tokens * plan.problem.batch,
        lanes=len(addresses),
    )
    driver.emit(Event("ended", start, now, detail={"report": report}))
    return report


class _Driver:
    """One run's traffic with the scheduler."""

    def __init__(self, plan: Plan, addresses: Sequence[str], client: Client, callbacks: Sequence[Callback]) -> None:
        self.name = uuid.uuid4().hex[:8]
        self._plan = plan
        self._addresses = addresses
        self._client = client
        self._callbacks = callbacks
        self._unfinished: dict[Key, Future[Event]] = {}

    def emit(self, event: Event) -> None:
        for callback in self._callbacks:
            callback(event)

    def drive(self) -> None:
        """Submit every piece of the graph, and see every task to its end."""
        schedule = Schedule(self._plan, len(self._addresses))
        builder = GraphBuilder(self.name, schedule, self._addresses, self._unfinished)
        order = schedule.order()
        finished = as_completed()
        attending = 0
        while True:
            while attending < WINDOW * schedule.lanes:
                subproblems = list(itertools.islice(order, PIECE * schedule.lanes))
                if not subproblems:
                    break
                attending += len(subproblems)
                finished.update(self._submit(*builder.piece(subproblems)))
            if not self._unfinished:
                return
            batch = finished.next_batch()
            for event in self._client.gather(batch):
                attending -= event.kind == "attended"
                self.emit(event)
            for future in batch:
                del self._unfinished[future.key]

    def _submit(self, graph: HighLevelGraph, keys: list[Key]) -> list[Future[Event]]:
        futures: list[Future[Event]] = self._client.get(graph, keys, sync=False)
        self._unfinished.update(zip(keys, futures, strict=True))
        return futures

    def stop(self) -> None:
        """Let what is executing end, let nothing else begin, and take the lanes down."""
        if self._unfinished:
            self._client.run(stop, self.name)
            wait(list(self._unfinished.values()))
        self._client.unregister_worker_plugin(plugin_name(self.name))
