"""Functions that Dask calls on workers: tasks, and what is done with the lane that a plugin keeps.

Arrays stay in the lane and in the stores. The further arguments of a task are the results of those that it waits for, and it
does not look at them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from distributed import Worker, get_worker

from oocattn.pipelines.engines.base import perform
from oocattn.pipelines.engines.dask.cluster import is_in_process
from oocattn.pipelines.engines.dask.departure import end_watch, watch_for_departure
from oocattn.pipelines.engines.dask.lane_plugin import LanePlugin, plugin_name, remove_passing, sendable_errors
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.graph import Task
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import TaskEvent


def find_plugin(run: str, worker: Worker) -> LanePlugin | None:
    """The plugin with the lane of a run on a worker."""
    plugin = worker.plugins.get(plugin_name(run))
    return plugin if isinstance(plugin, LanePlugin) else None


async def open_lane(name: str, run: Run, devices: Mapping[str, str], dask_worker: Worker) -> None:
    """Make the lane of this worker on its device, unless it was restarted since it was enlisted."""
    device = devices.get(dask_worker.id)
    if device is not None:
        with sendable_errors(), naming(SET_UP):
            if run.journal.mirror is not None and not is_in_process(dask_worker.address):
                run = run.elsewhere(Path(dask_worker.local_directory, f"{plugin_name(name)}-{uuid.uuid4().hex[:8]}"))
            try:
                lane = Lane(run, device)
            except BaseException:
                remove_passing(run)
                raise
        await dask_worker.plugin_add(LanePlugin(name, run, lane), plugin_name(name))
        await watch_for_departure(dask_worker)


async def close_lane(run: str, dask_worker: Worker) -> int:
    """Close the lane of a run on this worker; return how many there were."""
    plugin = find_plugin(run, dask_worker)
    if plugin is None:
        return 0
    plugin.dismissed = True
    await remove_lane(plugin, dask_worker)
    return 1


async def remove_lane(plugin: LanePlugin, worker: Worker) -> None:
    """Have a worker close the lane that a plugin keeps, and forget both."""
    await worker.plugin_remove(plugin_name(plugin.run))
    await end_watch(worker)


async def close_stale_lanes(result: str, state: Path, dask_worker: Worker) -> None:
    """Close lanes of runs to the same result, or with job state in the same folder, whose driver is gone."""
    for plugin in list(dask_worker.plugins.values()):
        if isinstance(plugin, LanePlugin) and (
            str(plugin.work.paths.result) == result or plugin.work.paths.state.is_relative_to(state)
        ):
            plugin.abandon()
            await remove_lane(plugin, dask_worker)


def stop(run: str, dask_worker: Worker) -> int:
    """Begin no more tasks of the run on this worker; return how many still execute (`LanePlugin`)."""
    plugin = find_plugin(run, dask_worker)
    if plugin is None:
        return 0
    plugin.stop()
    return len(plugin.executing)


async def save(run: str, dask_worker: Worker) -> int:
    """Save what a stopped run's lane here holds in memory alone; return the bytes."""
    plugin = find_plugin(run, dask_worker)
    return 0 if plugin is None else await plugin.save()


def perform_task(run: str, task: Task, *after: TaskEvent) -> TaskEvent | None:
    """Do a task on the lane of its worker; None where the run has been stopped, or has no lane here."""
    worker = get_worker()
    plugin = find_plugin(run, worker)
    if plugin is None or plugin.stopped:  # an error would be logged, and nobody may wait for it
        return None
    with sendable_errors(), plugin.counted():
        event = perform(plugin.lane, task)
        return None if event is None else replace(event, worker=str(worker.name))
