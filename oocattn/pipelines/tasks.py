"""The functions that Dask tasks call, and the worker plugin that holds the lane they work on.

Tasks carry numbers only: which slot, head group, subproblem or chunk. Arrays stay in the lane and in the stores. The
further arguments of a task are the results of those it waits for, and say nothing to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from distributed import Worker, WorkerPlugin, get_worker

from oocattn.pipelines.cpu_lane import CpuLane
from oocattn.pipelines.cuda_lane import CudaLane
from oocattn.pipelines.events import Event
from oocattn.pipelines.lane import Job, Lane


class LanePlugin(WorkerPlugin):
    """Gives every worker of a run its lane."""

    idempotent = True
    lane: Lane | None = None

    def __init__(self, job: Job) -> None:
        self.job = job
        self.name = plugin_name(job.run)
        self.stopped = False
        self.active: set[int] = set()

    def setup(self, worker: Worker) -> None:
        device = self.job.devices.get(worker.address)
        if device is not None:  # a worker that joins later takes no part
            self.lane = make_lane(self.job, device)

    def teardown(self, worker: Worker) -> None:
        if self.lane is not None:  # its set-up may have failed
            self.lane.close()
            self.lane = None


def make_lane(job: Job, device: str) -> Lane:
    """The lane of a worker: a new kind of device is registered here."""
    if device == "cpu":
        return CpuLane(job)
    return CudaLane(job, device)


class StoppedError(Exception):
    """The run was stopped before this task began."""


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


def stop(run: str, dask_worker: Worker) -> int:
    """Let no further task of the run begin on this worker; return how many are still executing."""
    plugin = dask_worker.plugins.get(plugin_name(run))
    if not isinstance(plugin, LanePlugin):
        return 0
    plugin.stopped = True
    return len(plugin.active)


def stage(run: str, turn: int, head_group: int, index: int, wanted: tuple[int, ...], *after: Event) -> Event:
    """Read the chunks of the subproblem that is number `turn` on this worker's lane, of which those are `wanted`."""
    with _lane(run) as lane:
        return _here(lane.stage(turn, head_group, index, wanted))


def attend(run: str, turn: int, *after: Event) -> Event:
    """Attend the subproblem that was staged as number `turn`."""
    with _lane(run) as lane:
        return _here(lane.attend(turn))


def merge(run: str, head_group: int, chunk: int, *after: Event) -> Event:
    """See the partials of a query chunk merged, checked and divided."""
    with _lane(run) as lane:
        return _here(lane.merge(head_group, chunk))


def write(run: str, head_group: int, chunk: int, *after: Event) -> Event:
    """See a merged query chunk written to the result, and release its partials."""
    with _lane(run) as lane:
        return _here(lane.write(head_group, chunk))


@contextmanager
def _lane(run: str) -> Iterator[Lane]:
    """The lane of this task's worker, which counts the task as executing meanwhile."""
    plugin = cast(LanePlugin | None, get_worker().plugins.get(plugin_name(run)))
    if plugin is None:
        raise StoppedError(f"run {run} has ended")
    thread = threading.get_ident()
    plugin.active.add(thread)  # before looking: whoever stops the lane sees either the task or its refusal
    try:
        if plugin.stopped or plugin.lane is None:
            raise StoppedError(f"run {run} was stopped")
        yield plugin.lane
    finally:
        plugin.active.discard(thread)


def _here(event: Event) -> Event:
    return replace(event, worker=str(get_worker().name))
