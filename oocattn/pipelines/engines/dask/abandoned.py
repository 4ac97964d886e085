"""Lanes whose driver is gone: the scheduler, which loses a client, has them closed, or their memory would stay taken."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, cast

from distributed import Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from oocattn.pipelines.engines.dask.departure import end_watch
from oocattn.pipelines.engines.dask.groups import leave_groups
from oocattn.pipelines.engines.dask.lane_plugin import plugin_name
from oocattn.pipelines.engines.dask.tasks import find_plugin

logger = logging.getLogger("oocattn")


class RunLanes(SchedulerPlugin):
    """Closes the lanes of a run when the client of its driver is gone, unless the run has ended by then."""

    def __init__(self, run: str, client: str) -> None:
        self.name = _name(run)
        self._run = run
        self._client = client
        self._closing: asyncio.Task[None] | None = None

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """A client is gone."""
        if client == self._client:
            self._closing = asyncio.get_running_loop().create_task(self._close(scheduler))

    async def _close(self, scheduler: Scheduler) -> None:
        logger.warning("the driver of run %s is gone: its lanes are closed", self._run)
        call = {"op": "run", "function": dumps(abandon_lane), "args": dumps((self._run,)), "kwargs": dumps({})}
        await scheduler.broadcast(msg=call, on_error="ignore")
        _leave_lanes(self._run, scheduler)


def follow_lanes(run: str, client: str, dask_scheduler: Scheduler) -> None:
    """Have the lanes of a run closed when its driver is gone."""
    plugin = RunLanes(run, client)
    dask_scheduler.add_plugin(plugin, name=plugin.name)


def leave_run(run: str, dask_scheduler: Scheduler) -> None:
    """The run has ended, and closed its lanes: nothing of it is followed any more."""
    _leave_lanes(run, dask_scheduler)
    leave_groups(run, dask_scheduler)


def _leave_lanes(run: str, scheduler: Scheduler) -> None:
    """Follow the lanes of a run no more, and forget their beats, which Dask would keep (distributed 2026.8)."""
    with suppress(AttributeError):
        cast(Any, scheduler)._broker._topics.pop(plugin_name(run), None)
    if _name(run) in scheduler.plugins:
        scheduler.remove_plugin(_name(run))


async def abandon_lane(run: str, dask_worker: Worker) -> None:
    """Close the lane of a run on this worker, if there is one; what it holds in memory alone is lost."""
    plugin = find_plugin(run, dask_worker)
    if plugin is not None:
        plugin.abandon()
        await dask_worker.plugin_remove(plugin_name(run))
        await end_watch(dask_worker)


def _name(run: str) -> str:
    """Name under which the lanes of a run are followed."""
    return f"oocattn-lanes-{run}"
