"""The functions that Dask tasks call, and the worker plugin that keeps the lane they work on.

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

from oocattn.pipelines.failing import SET_UP, naming, naming_chunk, naming_subproblem
from oocattn.pipelines.lane.lane import Job, Lane
from oocattn.pipelines.watch.events import TaskEvent


class LanePlugin(WorkerPlugin):
    """Keeps the lane that a worker has for a run, with partials in the folder `scratch`, and closes it with the worker."""

    def __init__(self, scratch: Path, lane: Lane) -> None:
        self.scratch = scratch
        self.lane = lane
        self.stopped = False

    def teardown(self, worker: Worker) -> None:
        self.lane.close()


async def open_lane(job: Job, dask_worker: Worker) -> None:
    """Make the lane of this worker, unless it was restarted after it was asked for its `Worker.id`."""
    device = job.devices.get(dask_worker.id)
    if device is not None:
        with naming(SET_UP):
            lane = Lane(job, device)
        await dask_worker.plugin_add(LanePlugin(job.scratch, lane), plugin_name(job.run))


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


async def close_lane(run: str, dask_worker: Worker) -> int:
    """Close the lane of a run on this worker; return how many there were."""
    if plugin_name(run) not in dask_worker.plugins:
        return 0
    await dask_worker.plugin_remove(plugin_name(run))
    return 1


async def close_lanes_left_behind(state: Path, dask_worker: Worker) -> None:
    """Close those of runs to the same result whose driver is gone, or they would hold their memory until the worker ends."""
    for name, plugin in list(dask_worker.plugins.items()):
        if isinstance(plugin, LanePlugin) and plugin.scratch.is_relative_to(state):
            plugin.stopped = True
            await dask_worker.plugin_remove(name)


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
    if not isinstance(plugin, LanePlugin):
        return 0
    return await asyncio.to_thread(plugin.lane.save)


def stage(run: str, turn: int, head_group: int, index: int, wanted: tuple[int, ...], *after: TaskEvent) -> TaskEvent | None:
    """Read the chunks of the subproblem that is number `turn` on this worker's lane, of which those are `wanted`."""
    with naming_subproblem(head_group, index):
        return _on_lane(run, lambda lane: lane.stage(turn, head_group, index, wanted))


def attend(run: str, turn: int, *after: TaskEvent) -> TaskEvent | None:
    """Attend the subproblem that was staged as number `turn`."""
    return _on_lane(run, lambda lane: lane.attend(turn))


def merge(run: str, head_group: int, chunk: int, *after: TaskEvent) -> TaskEvent | None:
    """See the partials of a query chunk merged, checked and divided."""
    with naming_chunk(head_group, chunk):
        return _on_lane(run, lambda lane: lane.merge(head_group, chunk))


def write(run: str, head_group: int, chunk: int, *after: TaskEvent) -> TaskEvent | None:
    """See a merged query chunk written to the result, and release its partials."""
    with naming_chunk(head_group, chunk):
        return _on_lane(run, lambda lane: lane.write(head_group, chunk))


def _on_lane(run: str, work: Callable[[Lane], TaskEvent]) -> TaskEvent | None:
    """Do the work of a task on its worker's lane.

    None, where the run has been stopped: nobody waits for the task any more, and an error would be logged.
    """
    worker = get_worker()
    plugin = cast(LanePlugin | None, worker.plugins.get(plugin_name(run)))
    if plugin is None or plugin.stopped:
        return None
    return replace(work(plugin.lane), worker=str(worker.name))
