"""Functions that Dask calls on workers: tasks, and the plugin that keeps a lane.

Arrays stay in the lane and in the stores. The further arguments of a task are the results of those that it waits for, and it
does not look at them.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker
from distributed.metrics import time as dask_time
from distributed.worker_state_machine import StartStop
from tornado.ioloop import PeriodicCallback

from oocattn import clock
from oocattn.pipelines.engines.base import perform
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.graph import Task
from oocattn.pipelines.lane.device_time import join_spans
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import Attended, Merged, Resource, Staged, TaskEvent, Written
from oocattn.threads import begin_call
from oocattn.units import format_seconds

logger = logging.getLogger("oocattn")

BEAT_SECONDS = 1.0  # between two signs of life of a lane
CLOSE_SECONDS = 10.0  # seconds in which a lane closes, or a worker goes on without
ENDED = ("memory", "error", "rescheduled")  # states that a worker gives a task when it has ended, cancelled or not

WORK: Mapping[type[TaskEvent], Resource] = {Staged: "read", Attended: "compute", Merged: "merge", Written: "write"}
"""The resource whose spans are the work of a task; otherwise it waits for its turn, for buffers and for other threads."""


class LanePlugin(WorkerPlugin):
    """Keeps a worker's lane for a run, whose partials lie in `scratch`, and closes it with the worker.

    Meanwhile the worker's event loop tells the driver, through the scheduler, how far the lane is, every second.

    `executing` are its tasks until the worker has heard of their end: one that is cancelled, and called released at once,
    still runs to its end. What the worker tells the scheduler of a task's time is its work alone.
    """

    def __init__(self, run: str, scratch: Path, lane: Lane) -> None:
        self.run = run
        self.scratch = scratch
        self.lane = lane
        self.stopped = False
        self.executing: set[Any] = set()
        self._worker: Worker | None = None
        self._beating = PeriodicCallback(self._beat, 1000 * BEAT_SECONDS)

    def setup(self, worker: Worker) -> None:
        """Know the worker, whose tasks are followed."""
        self._worker = worker
        self._beat()
        self._beating.start()

    def _beat(self) -> None:
        """Tell how far the lane is."""
        worker, lane = self._worker, self.lane
        if worker is not None:
            since_step = clock.now() - lane.stepped  # clocks of hosts may differ
            worker.log_event(plugin_name(self.run), [worker.address, str(worker.name), lane.pairs, since_step])

    def transition(self, key: Any, start: str, finish: str, **options: Any) -> None:
        """Follow a task's state; the worker's event loop calls this."""
        if self.run in str(key):
            if finish == "executing":
                self.executing.add(key)
            elif finish in ENDED:
                self.executing.discard(key)
                if finish == "memory" and self._worker is not None:
                    tell_work(self._worker, key)

    async def teardown(self, worker: Worker) -> None:
        """Close the lane; one that hangs is left to the end of the process."""
        self._beating.stop()
        closing = asyncio.wrap_future(begin_call(self.lane.close))
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if closing.done():
            closing.result()
        else:
            words = "worker %s: its lane did not close in %s and keeps its memory; restart the worker"
            logger.warning(words, worker.name, format_seconds(CLOSE_SECONDS))


def tell_work(worker: Worker, key: Any) -> None:
    """Replace the time that a task held its thread by that of its work, before the scheduler hears of it."""
    event, task = worker.data.get(key), worker.state.tasks[key]
    if isinstance(event, TaskEvent):
        shift = dask_time() - clock.now() + worker.scheduler_delay  # from the lane's clock to the scheduler's
        work = [span for span in join_spans(event.spans) if span.resource == WORK[type(event)]]
        if work:  # else nothing was to be done, and Dask needs some time of each task
            other = [stretch for stretch in task.startstops if stretch["action"] != "compute"]
            stretches = [StartStop(action="compute", start=span.start + shift, stop=span.stop + shift) for span in work]
            task.startstops[:] = other + stretches


def find_plugin(run: str, worker: Worker) -> LanePlugin | None:
    """The plugin with the lane of a run on a worker."""
    plugin = worker.plugins.get(plugin_name(run))
    return plugin if isinstance(plugin, LanePlugin) else None


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


@contextmanager
def sendable_errors() -> Iterator[None]:
    """Raise errors without the causes that cannot be sent to the driver: of the whole, Dask would send but the words."""
    try:
        yield
    except Exception as error:
        _drop_unsendable_causes(error)
        raise


def _drop_unsendable_causes(error: BaseException) -> None:
    for name in ("__cause__", "__context__"):
        inner = getattr(error, name)
        if inner is not None:
            _drop_unsendable_causes(inner)
            try:
                pickle.dumps(inner)
            except Exception:  # of whatever kind: aiohttp's errors hold headers, for one
                setattr(error, name, None)


async def open_lane(name: str, run: Run, devices: Mapping[str, str], dask_worker: Worker) -> None:
    """Make the lane of this worker on its device, unless it was restarted since it was enlisted."""
    device = devices.get(dask_worker.id)
    if device is not None:
        with sendable_errors(), naming(SET_UP):
            lane = Lane(run, device)
        await dask_worker.plugin_add(LanePlugin(name, run.paths.scratch, lane), plugin_name(name))


async def close_lane(run: str, dask_worker: Worker) -> int:
    """Close the lane of a run on this worker; return how many there were."""
    if find_plugin(run, dask_worker) is None:
        return 0
    await dask_worker.plugin_remove(plugin_name(run))
    return 1


async def close_stale_lanes(state: Path, dask_worker: Worker) -> None:
    """Close lanes of runs to the same result whose driver is gone, and free memory."""
    for name, plugin in list(dask_worker.plugins.items()):
        if isinstance(plugin, LanePlugin) and plugin.scratch.is_relative_to(state):
            plugin.stopped = True
            await dask_worker.plugin_remove(name)


def stop(run: str, dask_worker: Worker) -> int:
    """Begin no more tasks of the run on this worker; return how many still execute (`LanePlugin`)."""
    plugin = find_plugin(run, dask_worker)
    if plugin is None:
        return 0
    plugin.stopped = True
    return len(plugin.executing)


async def save(run: str, dask_worker: Worker) -> int:
    """Save what a stopped run's lane here holds in memory alone; return the bytes."""
    plugin = find_plugin(run, dask_worker)
    if plugin is None:
        return 0
    with sendable_errors():
        return await asyncio.wrap_future(begin_call(plugin.lane.save))


def perform_task(run: str, task: Task, *after: TaskEvent) -> TaskEvent | None:
    """Do a task on the lane of its worker; None where the run has been stopped, or has no lane here."""
    worker = get_worker()
    plugin = find_plugin(run, worker)
    if plugin is None or plugin.stopped:  # an error would be logged, and nobody may wait for it
        return None
    with sendable_errors():
        return replace(perform(plugin.lane, task), worker=str(worker.name))
