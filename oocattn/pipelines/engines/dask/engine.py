"""The Dask engine: workers that take part in a run, and the device of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from distributed import Client

from oocattn.errors import WorkerLostError
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.base import Check, Engine
from oocattn.pipelines.engines.dask.cluster import assign_devices, wait_for_workers, warn_of_open_ports
from oocattn.pipelines.engines.dask.enlisting import enlist, enlist_again
from oocattn.pipelines.engines.dask.lanes import DaskLanes
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.engines.dask.readiness import Expectations
from oocattn.pipelines.run import Run
from oocattn.planning.plan import Plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.growing import RunState

REPLACEMENT_SECONDS, LAST_REPLACEMENT_SECONDS = 10.0, 120.0
"""Time for a dead worker's replacement, and the last one's: a nanny takes seconds."""


class DaskEngine(Engine):
    """Workers of a client that are ready, at most as many as the plan counts."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ids: dict[str, str] = {}
        self._devices: dict[str, str] = {}
        self.dashboard = client.dashboard_link or ""

    @property
    def lane_count(self) -> int:
        return len(self._devices)

    def enlist(self, plan: Plan, dataset: Dataset, state: RunState, check: Check) -> Mapping[str, str]:
        expected = Expectations.of_run(plan, dataset, state)
        roll = enlist(self._client, expected, check)
        self._plan, self._expected = plan, replace(expected, computing=roll.computing)
        self._take(roll.ids)
        warn_of_open_ports(self._client)
        return roll.computing

    def replenish(self, check: Check) -> None:
        wait_for_workers(self._client, self.lane_count, REPLACEMENT_SECONDS, LAST_REPLACEMENT_SECONDS, check)
        self._take(enlist_again(self._client, self._expected, check))

    def _take(self, ids: dict[str, str]) -> None:
        """Have these workers take part, by address; WorkerLostError where none is left."""
        devices = assign_devices(self._client, self._plan.device, ids)
        self._ids, self._devices = ids, dict(itertools.islice(devices.items(), self._plan.lanes))
        if not self._devices:
            raise WorkerLostError("no worker is ready to continue: the work that was done is on disk; start some and resume")

    def lanes(self, run: Run, deadline: Deadline) -> DaskLanes:
        devices = {self._ids[address]: device for address, device in self._devices.items()}
        return DaskLanes(self._client, run, devices, list(self._devices), deadline)


@contextmanager
def local_engine(dashboard_address: str, workers: int) -> Iterator[DaskEngine]:
    """The engine of a new cluster in this process (see `local_client`)."""
    with local_client(dashboard_address, workers) as client:
        yield DaskEngine(client)
