"""What Dask calls on workers: the plugin that keeps the lane of a run there, its tasks, and what is asked of it as it ends.

Arrays stay in the lane and in the stores. The further arguments of a task are the results of those that it waits for, and it
does not look at them.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from oocattn.pipelines.engines.base import perform
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.graph import Task
from oocattn.pipelines.lane.lane import Job, Lane
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.threads import begin_call
from oocattn.units import format_seconds

logger = logging.getLogger("oocattn")

CLOSE_SECONDS = 10.0
"""Seconds in which a lane closes, or a worker goes on without."""


class LanePlugin(WorkerPlugin):
    """Keeps the lane that a worker has for a run, with partials in the folder `scratch`, and closes it with the worker.

    `executing` are the tasks of the run that execute, until the worker has heard of their end.
    """

    def __init__(self, run: str, scratch: Path, lane: Lane) -> None:
        self.run = run
        self.scratch = scratch
        self.lane = lane
        self.stopped = False
        self.executing: set[Any] = set()

    def transition(self, key: Any, start: str, finish: str, **options: Any) -> None:
        """Called by the worker, in its event loop, when a task of whomever gets another state."""
        if self.run in str(key):
            if finish == "executing":
                self.executing.add(key)
            else:
                self.executing.discard(key)

    async def teardown(self, worker: Worker) -> None:
        """Close the lane; one that hangs is left to the end of the process."""
        closing = asyncio.wrap_future(begin_call(self.lane.close))
        ended, _ = await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if not ended:
            logger.warning(
                "worker %s: its lane did not close in %s and keeps its memory; restart the worker",
                worker.name,
                format_seconds(CLOSE_SECONDS),
            )
        for each in ended:
            each.result()


def find_plugin(run: str, worker: Worker) -> LanePlugin | None:
    """The plugin with the lane of a run on a worker."""
    plugin = worker.plugins.get(plugin_name(run))
    return plugin if isinstance(plugin, LanePlugin) else None


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


async def open_lane(job: Job, dask_worker: Worker) -> None:
    """Make the lane of this worker, unless it was restarted after it was asked for its `Worker.id`."""
    device = job.devices.get(dask_worker.id)
    if device is not None:
        with naming(SET_UP):
            lane = Lane(job, device)
        await dask_worker.plugin_add(LanePlugin(job.run, job.scratch, lane), plugin_name(job.run))


async def close_lane(run: str, dask_worker: Worker) -> int:
    """Close the lane of a run on this worker; return how many there were."""
    if find_plugin(run, dask_worker) is None:
        return 0
    await dask_worker.plugin_remove(plugin_name(run))
    return 1


async def close_stale_lanes(state: Path, dask_worker: Worker) -> None:
    """Close the lanes of runs to the same result whose driver is gone: else they hold their memory until the worker ends."""
    for name, plugin in list(dask_worker.plugins.items()):
        if isinstance(plugin, LanePlugin) and plugin.scratch.is_relative_to(state):
            plugin.stopped = True
            await dask_worker.plugin_remove(name)


def stop(run: str, dask_worker: Worker) -> int:
    """Let no further task of the run begin on this worker; return how many still execute.

    A task that has returned executes until the worker has heard of it: a worker that closes complains of one cut off there.
    """
    plugin = find_plugin(run, dask_worker)
    if plugin is None:
        return 0
    plugin.stopped = True
    return len(plugin.executing)


async def save(run: str, dask_worker: Worker) -> int:
    """Have on disk what the lane of a stopped run on this worker holds in memory alone; return the bytes written."""
    plugin = find_plugin(run, dask_worker)
    return 0 if plugin is None else await asyncio.wrap_future(begin_call(plugin.lane.save))


def perform_task(run: str, task: Task, *after: TaskEvent) -> TaskEvent | None:
    """Do a task on the lane of its worker.

    None, where the run has been stopped, or has no lane here: an error would be logged, and nobody may wait for it.
    """
    worker = get_worker()
    plugin = find_plugin(run, worker)
    if plugin is None or plugin.stopped:
        return None
    return replace(perform(plugin.lane, task), worker=str(worker.name))
