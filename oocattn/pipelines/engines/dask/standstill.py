"""A run in which nothing ends: for how long, which worker is why, what to do, and when it has been too long.

Dask waits without a word for a worker that is paused, stopped, closing or busy with the tasks of others. So a lane of which
no task has ended for a while is looked at: its worker is asked what it does, and its scheduler where it put the tasks. A
lane that still does pieces of a task works, however much longer the task takes than was planned. Time is that in which the
driver waited: what passes while its own process is stopped does not count.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Client, Worker, get_worker
from distributed.threadpoolexecutor import thread_state

from oocattn import clock
from oocattn.errors import StalledError
from oocattn.pipelines import deadline as limits
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.dask.cluster import begin_call, worker_addresses
from oocattn.pipelines.engines.dask.tasks import LanePlugin, plugin_name
from oocattn.pipelines.failing import place_of
from oocattn.pipelines.graph import Key
from oocattn.pipelines.watch.events import Callback, Stalled
from oocattn.text import some_of
from oocattn.units import format_bytes, format_seconds

ANSWER = 5.0
"""Seconds in which a worker says what it does, and a scheduler where tasks are."""

WAITS = 10
"""Waits in that time: one that ends late, because this process was stopped, is not all of it."""

MOST_NAMED = 3
"""Tasks or workers of a kind that a message names."""

UNASSIGNED = {"no-worker", "queued", "waiting"}
"""States of tasks, at a scheduler, that no worker has."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Occupation:
    """What a worker says of itself: its state as Dask has it, its threads, the tasks that hold one, its memory in bytes, and
    the seconds since its lane last did a piece of a task (Inf without a lane)."""

    status: str
    threads: int
    executing: tuple[str, ...]
    memory: int
    memory_limit: int
    since_step: float = math.inf


@dataclass(frozen=True)
class Obstacle:
    """What keeps a worker from the tasks of a run, and what to do."""

    found: str
    remedy: str


def occupation(run: str, dask_worker: Worker) -> Occupation:
    """What this worker does, for a run and otherwise."""
    executing = tuple(str(task.key) for task in dask_worker.state.executing)
    limit = dask_worker.memory_manager.memory_limit or 0
    memory = dask_worker.monitor.get_process_memory()
    plugin = dask_worker.plugins.get(plugin_name(run))
    since_step = clock.now() - plugin.lane.stepped if isinstance(plugin, LanePlugin) else math.inf
    return Occupation(dask_worker.status.name, dask_worker.state.nthreads, executing, memory, limit, since_step)


def find_obstacle(run: str, found: Occupation | None) -> Obstacle | None:
    """What keeps a worker that said this, or nothing, from the tasks of a run."""
    if found is None:
        return Obstacle(
            "does not answer: its process is stopped, or busy in a way that lets nothing else run",
            "let it go on or restart it",
        )
    if found.status == "paused":
        uses = f", at {format_bytes(found.memory)} of its memory limit of {format_bytes(found.memory_limit)}"
        return Obstacle(
            f"is paused by Dask{uses if found.memory_limit else ''}",
            "start workers with memory_limit=0 (--memory-limit 0), or with a larger one: Dask counts mapped files",
        )
    if found.status != "running":
        return Obstacle(f"is {found.status.replace('_', ' ')}", "start another worker")
    others = [key for key in found.executing if run not in key]
    if len(others) >= found.threads:
        threads = "its only thread" if found.threads == 1 else f"all of its {found.threads} threads"
        return Obstacle(
            f"is busy with tasks of others on {threads}: {some_of(others, MOST_NAMED)}",
            "wait until they end, or give the run a worker of its own or one with more threads; a task that starts a run "
            "does it within distributed.worker_client()",
        )
    return None


class Standstill:
    """Watches that tasks of an attempt end: tells what keeps them, and raises StalledError when none did for too long.

    `pending` gives the unfinished tasks of each worker; it gives none while lanes are made.
    """

    def __init__(
        self,
        run: str,
        client: Client,
        workers: Iterable[str],
        pending: Callable[[], Mapping[str, Sequence[Key]]],
        emit: Callback,
        deadline: Deadline,
    ) -> None:
        self._run = run
        self._client = client
        self._pending = pending
        self._emit = emit
        self._deadline = deadline
        self._waited = self._looked = self._progressed = 0.0
        self._ended = dict.fromkeys(workers, 0.0)  # how long was waited in all when a task of each last ended
        self._asked: dict[str, ThreadFuture[Any]] = {}
        self._told: Mapping[str, Obstacle] = {}

    def progress(self, worker: str) -> None:
        """A task of this worker's lane ended."""
        self._progressed = self._ended[worker] = self._waited
        if worker in self._told or "" in self._told:
            self._tell({})

    def begin(self) -> None:
        """Lanes are made: their tasks can begin."""
        self._progressed = self._waited
        self._ended = dict.fromkeys(self._ended, self._waited)
        self._tell({})

    def add(self, seconds: float) -> None:
        """So long was waited. Raises StalledError where nothing has ended for too long."""
        self._waited += seconds
        if self._idle > self._deadline.stalled:
            pending = self._pending()
            obstacles = self._look(pending, list(pending or self._ended)) or {"": self._unexplained(pending)}
            if (idle := self._idle) <= self._deadline.stalled:
                return  # a task that takes long goes on
            raise StalledError(
                f"nothing has ended for {format_seconds(idle)}: {_words(obstacles)}; what was done is on disk: resume then"
            )
        if self._waited - max(self._looked, min(self._ended.values())) >= limits.NOTICED:
            before, self._looked = self._progressed, self._waited
            pending = self._pending()
            at_rest = [name for name in pending or self._ended if self._waited - self._ended[name] >= limits.NOTICED]
            obstacles = self._look(pending, at_rest)
            if not obstacles and self._progressed > before:
                self._looked = self._progressed
            elif not obstacles and self._idle >= self._deadline.noticed:
                obstacles = {"": self._unexplained(pending)}
            self._tell(obstacles)

    @property
    def _idle(self) -> float:
        """Seconds for which nothing has gone on."""
        return self._waited - self._progressed

    def _look(self, pending: Mapping[str, Sequence[Key]], workers: Sequence[str]) -> dict[str, Obstacle]:
        """What keeps these workers, or under "" what keeps all. Those whose lanes are at a task that takes long go on."""
        if not workers:
            return {}
        keys = list(itertools.chain.from_iterable(pending.values()))
        scheduler: Any = self._client.scheduler
        states = self._ask({"": lambda: self._client.sync(scheduler.get_task_status, keys=keys)})
        if "" not in states:
            return {}
        if states[""] is None:
            return {"": Obstacle("the scheduler does not answer", "let it go on or restart it")}
        if keys and set(states[""].values()) <= UNASSIGNED:
            place = f"{place_of(keys[0])} (state {states[''][keys[0]]})"
            unassigned = Obstacle(
                f"Dask gives {place} to no worker", "see that workers run, with the resources that dask.annotate asks for"
            )
        else:
            unassigned = None
        said = self._ask({name: partial(self._client.run, occupation, self._run, workers=[name]) for name in workers})
        for name, answer in said.items():
            if answer and answer[name].since_step < limits.NOTICED:
                self._ended[name] = max(self._ended[name], self._waited - answer[name].since_step)
                self._progressed = max(self._progressed, self._ended[name])
        found = {name: find_obstacle(self._run, answer and answer[name]) for name, answer in said.items()}
        obstacles = {name: obstacle for name, obstacle in found.items() if obstacle}
        return obstacles or ({"": unassigned} if unassigned else {})

    def _ask(self, questions: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """The answers: None where there is none in time, and nothing of who is gone, which the attempt finds itself.

        Who has not answered the last question is not asked another one.
        """
        for name, question in questions.items():
            if name not in self._asked or self._asked[name].done():
                self._asked[name] = begin_call(question)
        asked = [self._asked[name] for name in questions]
        for _ in range(WAITS):
            if not wait(asked, timeout=ANSWER / WAITS).not_done:
                break
        answers = {name: self._asked[name] for name in questions}
        return {
            name: answer.result() if answer.done() else None
            for name, answer in answers.items()
            if not answer.done() or answer.exception() is None
        }

    def _unexplained(self, pending: Mapping[str, Sequence[Key]]) -> Obstacle:
        """What is left where no worker is kept from its tasks: one of those does not end."""
        places = dict.fromkeys(place_of(key) for keys in pending.values() for key in keys[:1])
        what = some_of(list(places), MOST_NAMED) or "the set-up of lanes"
        return Obstacle(
            f"{what} does not end on worker {some_of(list(pending or self._ended), MOST_NAMED)}",
            "see to the storage that it reads and writes, and restart the worker",
        )

    def _tell(self, obstacles: Mapping[str, Obstacle]) -> None:
        """Log what keeps the run, or that nothing does any more, and pass it on; once each time that it changes."""
        before, self._told = self._told, obstacles
        if {name: obstacle.remedy for name, obstacle in before.items()} == {
            name: obstacle.remedy for name, obstacle in obstacles.items()
        }:
            return
        now = clock.now()
        reason = _words(obstacles)
        if reason:
            limit = format_seconds(self._deadline.stalled)
            logger.warning("the run stalls: %s; it ends, to be resumed, when no task has ended for %s", reason, limit)
        else:
            logger.warning("the run goes on")
        since = min((self._ended[name] for name in obstacles if name), default=self._progressed)
        self._emit(Stalled(start=now - (self._waited - since), stop=now, reason=reason))


def _words(obstacles: Mapping[str, Obstacle]) -> str:
    """What keeps which workers, and what to do."""
    named: dict[Obstacle, list[str]] = {}
    for name, obstacle in obstacles.items():
        named.setdefault(obstacle, []).append(name)
    words = [
        f"{f'worker {some_of(names, MOST_NAMED)} ' if any(names) else ''}{obstacle.found}: {obstacle.remedy}"
        for obstacle, names in itertools.islice(named.items(), MOST_NAMED)
    ]
    return "; ".join(words)


def refuse_own_thread(client: Client) -> None:
    """Raise StalledError where the calling thread is a task's and the only one of a worker that would take part."""
    if not getattr(thread_state, "proceed", False):  # no task's, or one that has seceded
        return
    worker = get_worker()
    if worker.state.nthreads == 1 and worker.address in worker_addresses(client):
        raise StalledError(
            f"worker {worker.address} has one thread, which executes the task that starts this run, so the run's own tasks "
            "would never begin: start it within distributed.worker_client(), or give the worker more threads"
        )
