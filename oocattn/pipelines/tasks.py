"""The functions that Dask tasks call, and the worker plugin that holds the lane they work on.

Tasks carry numbers only: which slot, head group, subproblem or chunk. Arrays stay in the lane and in the stores. The
further arguments of a task are the results of those it waits for, and say nothing to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from distributed import Worker, WorkerPlugin, get_worker

from oocattn.forks import remember_lane
from oocattn.pipelines.cpu_lane import CpuLane
from oocattn.pipelines.cuda_lane import CudaLane
from oocattn.pipelines.events import Event
from oocattn.pipelines.failing import SET_UP, naming, naming_chunk, naming_subproblem
from oocattn.pipelines.lane import Job, Lane


class LanePlugin(WorkerPlugin):
    """Gives every worker of a run its lane."""

    idempotent = True
    lane: Lane | None = None

    def __init__(self, job: Job) -> None:
        self.job = job
        self.name = plugin_name(job.run)
        self.stopped = False

    def setup(self, worker: Worker) -> None:
        device = self.job.devices.get(worker.id)
        if device is not None:  # a worker that joins later, or is restarted, takes no part
            with naming(SET_UP):
                self.lane = make_lane(self.job, device)

    def teardown(self, worker: Worker) -> None:
        if self.lane is not None:  # its set-up may have failed
            self.lane.close()
            self.lane = None


def make_lane(job: Job, device: str) -> Lane:
    """The lane of a worker: a new kind of device is registered here."""
    remember_lane()
    if device == "cpu":
        return CpuLane(job)
    return CudaLane(job, device)


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


def plugins_of(scratch: Path, dask_worker: Worker) -> list[str]:
    """The plugins on a worker with lanes that work, or have worked, with partials in this folder."""
    plugins = [plugin for plugin in dask_worker.plugins.values() if isinstance(plugin, LanePlugin)]
    return [plugin.name for plugin in plugins if plugin.job.scratch == scratch]


def stop(run: str, dask_worker: Worker) -> int:
    """Let no further task of the run begin on this worker; return how many are still executing."""
    plugin = dask_worker.plugins.get(plugin_name(run))
    if not isinstance(plugin, LanePlugin):
        return 0
    plugin.stopped = True
    # The worker's own count, not one of ours: also a task that has returned is executing until the worker has heard of it,
    # and one that is cut off there, by a worker that closes, is complained of.
    return sum(run in str(task.key) for task in dask_worker.state.executing)


async def save(run: str, dask_worker: Worker) -> int:
    """Have on disk what the lane of a stopped run on this worker holds in memory alone; return the bytes written."""
    plugin = dask_worker.plugins.get(plugin_name(run))
    if not isinstance(plugin, LanePlugin) or plugin.lane is None:
        return 0
    return await asyncio.to_thread(plugin.lane.save)


def stage(run: str, turn: int, head_group: int, index: int, wanted: tuple[int, ...], *after: Event) -> Event | None:
    """Read the chunks of the subproblem that is number `turn` on this worker's lane, of which those are `wanted`."""
    with naming_subproblem(head_group, index):
        return _on_lane(run, lambda lane: lane.stage(turn, head_group, index, wanted))


def attend(run: str, turn: int, *after: Event) -> Event | None:
    """Attend the subproblem that was staged as number `turn`."""
    return _on_lane(run, lambda lane: lane.attend(turn))


def merge(run: str, head_group: int, chunk: int, *after: Event) -> Event | None:
    """See the partials of a query chunk merged, checked and divided."""
    with naming_chunk(head_group, chunk):
        return _on_lane(run, lambda lane: lane.merge(head_group, chunk))


def write(run: str, head_group: int, chunk: int, *after: Event) -> Event | None:
    """See a merged query chunk written to the result, and release its partials."""
    with naming_chunk(head_group, chunk):
        return _on_lane(run, lambda lane: lane.write(head_group, chunk))


def _on_lane(run: str, work: Callable[[Lane], Event]) -> Event | None:
    """Do the work of a task on its worker's lane.

    None, where the run has been stopped: nobody waits for the task any more, and an error would be logged.
    """
    worker = get_worker()
    plugin = cast(LanePlugin | None, worker.plugins.get(plugin_name(run)))
    if plugin is None or plugin.stopped or plugin.lane is None:
        return None
    return replace(work(plugin.lane), worker=str(worker.name))
