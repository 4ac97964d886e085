"""Obstacles of workers on a Dask cluster, found by asking them and the scheduler.

Dask waits without a word for a worker that is paused, stopped, closing or busy with the tasks of others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from distributed import Client, Worker, get_worker
from distributed.threadpoolexecutor import thread_state

from oocattn import clock
from oocattn.errors import StalledError
from oocattn.pipelines.engines.base import Obstacle
from oocattn.pipelines.engines.dask.cluster import begin, worker_addresses
from oocattn.pipelines.engines.dask.tasks import find_plugin
from oocattn.pipelines.graph import Task
from oocattn.text import some_of
from oocattn.units import format_bytes

MOST_NAMED = 3  # tasks of others that a message names
SOON_SECONDS = 5.0  # in which a worker says what it does, and a scheduler where tasks are
WAITS = 10  # parts of that wait; a late one, because this process was stopped, is not all of it
UNASSIGNED = {"no-worker", "queued", "waiting"}  # states of tasks, at a scheduler, that no worker has


@dataclass(frozen=True)
class Occupation:
    """A worker's account of itself: its state as Dask has it, the tasks that hold a thread, its memory in bytes, and the
    seconds since its lane's last step (Inf without a lane)."""

    status: str
    threads: int
    executing: tuple[str, ...]
    memory: int
    memory_limit: int
    since_step: float = math.inf


def describe_occupation(run: str, dask_worker: Worker) -> Occupation:
    """This worker's account of itself, for a run."""
    executing = tuple(map(str, dask_worker.active_threads.copy().values()))
    limit = dask_worker.memory_manager.memory_limit or 0
    memory = dask_worker.monitor.get_process_memory()
    plugin = find_plugin(run, dask_worker)
    since_step = math.inf if plugin is None else clock.now() - plugin.lane.stepped
    return Occupation(dask_worker.status.name, dask_worker.state.nthreads, executing, memory, limit, since_step)


def find_obstacle(run: str, occupation: Occupation | None) -> Obstacle | None:
    """The obstacle of a worker that gave this account, or none."""
    if occupation is None:
        return Obstacle(
            "does not answer: its process is stopped, or busy in a way that lets nothing else run",
            "continue it (kill -CONT) or restart it",
        )
    if occupation.status == "paused":
        uses = f", at {format_bytes(occupation.memory)} of its memory limit of {format_bytes(occupation.memory_limit)}"
        return Obstacle(
            f"is paused by Dask{uses if occupation.memory_limit else ''}",
            "start workers with memory_limit=0 (--memory-limit 0), or with a larger one: Dask counts mapped files",
        )
    if occupation.status != "running":
        return Obstacle(f"is {occupation.status.replace('_', ' ')}", "start another worker")
    others = [key for key in occupation.executing if run not in key]
    if len(others) >= occupation.threads:
        threads = "its only thread" if occupation.threads == 1 else f"all of its {occupation.threads} threads"
        return Obstacle(
            f"is busy with tasks of others on {threads}: {some_of(others, MOST_NAMED)}",
            "wait until they end, or give the run a worker of its own or one with more threads; a task that starts a run "
            "does it within distributed.worker_client()",
        )
    return None


class Inquiry:
    """Asks workers and scheduler for their state. Who owes an answer is not asked again."""

    def __init__(self, run: str, client: Client) -> None:
        self._run = run
        self._client = client
        self._calls: dict[str, Future[Any]] = {}

    def look(
        self, pending: Mapping[str, Mapping[Any, Task]], workers: Sequence[str]
    ) -> tuple[dict[str, Obstacle], dict[str, float]]:
        """As `Lanes.look`; `pending` has the tasks of each worker by their keys."""
        keys = list(itertools.chain.from_iterable(pending.values()))
        scheduler: Any = self._client.scheduler
        states = self._ask({"": lambda: scheduler.get_task_status(keys=keys)})
        if "" not in states:
            return {}, {}
        if states[""] is None:
            return {"": Obstacle("the scheduler does not answer", "continue it (kill -CONT) or restart it")}, {}
        questions = {name: partial(self._client.run, describe_occupation, self._run, workers=[name]) for name in workers}
        said = {name: answer and answer[name] for name, answer in self._ask(questions).items()}
        steps = {name: answer.since_step for name, answer in said.items() if answer}
        found = {name: find_obstacle(self._run, answer) for name, answer in said.items()}
        obstacles = {name: obstacle for name, obstacle in found.items() if obstacle}
        if not obstacles and keys and set(states[""].values()) <= UNASSIGNED:
            first = next(task for tasks in pending.values() for task in tasks.values())
            place = f"{first.place} (state {states[''][keys[0]]})"
            remedy = "see that workers run, with the resources that dask.annotate asks for"
            obstacles[""] = Obstacle(f"Dask gives {place} to no worker", remedy)
        return obstacles, steps

    def _ask(self, questions: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        """The answers; None where there is none in time. Who is gone is left out: the attempt finds that itself."""
        for name, question in questions.items():
            if name not in self._calls or self._calls[name].done():
                self._calls[name] = begin(self._client, question)
        calls = {name: self._calls[name] for name in questions}
        for _ in range(WAITS):
            if not wait(calls.values(), timeout=SOON_SECONDS / WAITS).not_done:
                break
        return {
            name: call.result() if call.done() else None
            for name, call in calls.items()
            if not call.done() or call.exception() is None
        }


def refuse_own_thread(client: Client) -> None:
    """Raise StalledError where a run would wait for the only thread, its caller's."""
    if not getattr(thread_state, "proceed", False):  # no task's, or one that has seceded
        return
    worker = get_worker()
    if worker.state.nthreads == 1 and worker.address in worker_addresses(client):
        raise StalledError(
            f"worker {worker.address} has one thread, which executes the task that starts this run, so the run's own tasks "
            "would never begin: start it within distributed.worker_client(), or give the worker more threads"
        )
