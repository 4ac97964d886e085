"""Task groups of a run at the scheduler, one a step, of which Dask's pages count and draw the tasks.

The pages lay groups out by their dependencies, fail where these form a cycle (stage waits for attend, attend for stage) or
where names are not in that order, and leave out tasks that are forgotten, which nearly all of a long run are.
"""

from __future__ import annotations

from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin


class RunGroups(SchedulerPlugin):
    """Counts tasks of a run that are forgotten as released, and drops edges between its groups, until the run ends."""

    def __init__(self, run: str, client: str, scheduler: Scheduler) -> None:
        self.name = plugin_name(run)
        self._run = run
        self._client = client
        self._scheduler = scheduler
        self._counted: dict[str, int] = {}  # tasks that were forgotten, by group
        self._ended = False

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
        """A driver that is gone has ended its run."""
        if client == self._client:
            self.end()

    def end(self) -> None:
        """Leave, and let the scheduler forget the groups, when it has forgotten their tasks."""
        self._ended = True
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


def plugin_name(run: str) -> str:
    """Name under which the groups of a run are followed."""
    return f"oocattn-groups-{run}"


def follow_groups(run: str, client: str, dask_scheduler: Scheduler) -> None:
    """Have the groups of a run show what it has done."""
    plugin = RunGroups(run, client, dask_scheduler)
    dask_scheduler.add_plugin(plugin, name=plugin.name)


def leave_groups(run: str, dask_scheduler: Scheduler) -> None:
    """The run has ended."""
    plugin = dask_scheduler.plugins.get(plugin_name(run))
    if isinstance(plugin, RunGroups):
        plugin.end()
