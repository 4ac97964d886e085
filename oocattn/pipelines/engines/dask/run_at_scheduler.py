"""A run at the scheduler: its task groups, which Dask's pages draw, and the end of its lanes with its driver.

The pages lay groups out by their dependencies, fail where these form a cycle (stage waits for attend, attend for stage) or
where names are not in that order, and leave out tasks that are forgotten, which nearly all of a long run are. Lanes whose
driver is gone would keep their memory: the scheduler, which loses a client, has them closed.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, cast

from distributed import Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from oocattn.pipelines.engines.dask.lane_plugin import plugin_name
from oocattn.pipelines.engines.dask.tasks import find_plugin, remove_lane

logger = logging.getLogger("oocattn")


class RunAtScheduler(SchedulerPlugin):
    """Follows a run until it ends, or its client is gone, and then until its tasks are forgotten.

    It counts tasks that are forgotten as released, drops edges between the run's groups, and closes the lanes of a run
    whose client is gone before the run has ended.
    """

    def __init__(self, run: str, client: str, scheduler: Scheduler) -> None:
        self.name = _name(run)
        self._run = run
        self._client = client
        self._scheduler = scheduler
        self._counted: dict[str, int] = {}  # tasks that were forgotten, by group
        self._ended = False
        self._closing: asyncio.Task[None] | None = None

    def update_graph(self, scheduler: Scheduler, **options: Any) -> None:
        """Tasks were submitted."""
        for name, group in scheduler.task_groups.items():
            if name.endswith(self._run):
                group.dependencies.clear()

    def transition(self, key: Any, start: str, finish: str, *args: Any, **options: Any) -> None:
        """Follow a task to its end."""
        if finish == "forgotten" and isinstance(key, tuple) and str(key[0]).endswith(self._run):
            self._counted[key[0]] = self._counted.get(key[0], 0) + 1
            self._count(key[0], 1)
            if self._ended:
                self._leave()

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """A client is gone."""
        if client == self._client and not self._ended:
            self._closing = asyncio.get_running_loop().create_task(self._close_lanes())

    async def _close_lanes(self) -> None:
        logger.warning("the driver of run %s is gone: its lanes are closed", self._run)
        call = {"op": "run", "function": dumps(abandon_lane), "args": dumps((self._run,)), "kwargs": dumps({})}
        await self._scheduler.broadcast(msg=call, on_error="ignore")
        self.end()

    def end(self) -> None:
        """Leave, and let the scheduler forget beats and groups, when it has forgotten their tasks."""
        self._ended = True
        with suppress(AttributeError):  # Dask would keep what lanes told of themselves (distributed 2026.8)
            cast(Any, self._scheduler)._broker._topics.pop(plugin_name(self._run), None)
        self._leave()

    def _leave(self) -> None:
        groups = self._scheduler.task_groups
        if any(
            sum(groups[name].states.values()) > self._counted.get(name, 0) for name in groups if name.endswith(self._run)
        ):
            return
        for name, count in self._counted.items():
            self._count(name, -count)
            groups[name].prefix.remove_group(groups[name])
            del groups[name]
        self._scheduler.remove_plugin(self.name)

    def _count(self, name: str, count: int) -> None:
        """Count so many forgotten tasks of a group as released."""
        group = self._scheduler.task_groups[name]
        for states in (group.states, group.prefix.states):
            states["forgotten"] -= count
            states["released"] += count


def follow_run(run: str, client: str, dask_scheduler: Scheduler) -> None:
    """Have a run of this client followed."""
    plugin = RunAtScheduler(run, client, dask_scheduler)
    dask_scheduler.add_plugin(plugin, name=plugin.name)


def leave_run(run: str, dask_scheduler: Scheduler) -> None:
    """The run has ended, and closed its lanes."""
    plugin = dask_scheduler.plugins.get(_name(run))
    if isinstance(plugin, RunAtScheduler):
        plugin.end()


async def abandon_lane(run: str, dask_worker: Worker) -> None:
    """Close the lane of a run on this worker, if there is one; what it holds in memory alone is lost."""
    plugin = find_plugin(run, dask_worker)
    if plugin is not None:
        plugin.abandon()
        await remove_lane(plugin, dask_worker)


def _name(run: str) -> str:
    """Name under which a run is followed."""
    return f"oocattn-run-{run}"
