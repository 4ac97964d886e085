"""A run that stands still says why, where and what to do; it ends after a while, or goes on when it can."""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import dask
import pytest
from distributed import Client, LocalCluster, Status, get_worker, secede
from distributed.worker import Worker
from support import Recorder, assert_nothing_written, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Callback, Event, Result, StalledError
from oocattn.pipelines import attempt, deadline
from oocattn.pipelines.engines.base import Obstacle
from oocattn.pipelines.engines.dask import obstacles
from oocattn.pipelines.engines.dask.obstacles import Occupation, find_obstacle
from oocattn.pipelines.graph import Task
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.standstill import Standstill
from oocattn.pipelines.watch.events import Attended

RUN = "1234abcd"

Keep = Callable[[Client], AbstractContextManager[Callback]]
"""Keeps the workers of a client from the tasks of a run that has this callback."""


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130))


@pytest.fixture
def right(client: Client, dataset: Path, fast_path: Path) -> Result:
    return carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "right.zarr", client)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "STALLED_SECONDS", 0.6)
    monkeypatch.setattr(deadline, "NOTICED_SECONDS", 0.2)
    monkeypatch.setattr(deadline, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "does not answer.*restart it"),
        (Occupation("paused", 4, (), 3 << 30, 2 << 30), "is paused by Dask, at 3 GiB of its memory limit of 2 GiB.*limit=0"),
        (Occupation("paused", 4, (), 3 << 30, 0), "is paused by Dask;.*memory_limit=0"),
        (Occupation("closing_gracefully", 4, (), 0, 0), "is closing gracefully;start another"),
        (Occupation("running", 1, ("theirs",), 0, 0), "tasks of others on its only thread: theirs;.*worker_client"),
        (Occupation("running", 4, tuple("abcd"), 0, 0), "on all of its 4 threads: a, b, c and 1 more"),
        (Occupation("running", 4, ("a", "b", "c", f"('attend-{RUN}', 0, 1)"), 0, 0), ""),
        (Occupation("running", 4, (), 3 << 30, 2 << 30), ""),
    ],
)
def test_what_keeps_a_worker(found: Occupation | None, words: str) -> None:
    obstacle = find_obstacle(RUN, found)
    if not words:
        assert obstacle is None
    else:
        assert obstacle is not None
        assert re.search(words, f"{obstacle.fault};{obstacle.remedy}")


class LateQueue(queue.SimpleQueue[Any]):
    """A queue whose reader is once woken half a second late, as in a process that was stopped."""

    late: ClassVar[list[float]] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if timeout is not None and self.late:
            time.sleep(self.late.pop() + timeout)
        return super().get(block, timeout)


@pytest.mark.parametrize("engine", ["inline", "dask"])
def test_time_in_which_the_process_was_stopped_is_told_as_a_stall(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(LateQueue, "late", [0.5])
    monkeypatch.setattr("oocattn.pipelines.engines.base.queue.SimpleQueue", LateQueue)
    monkeypatch.setattr(attempt, "STOPPED_SECONDS", 0.2)
    monkeypatch.setattr("oocattn.pipelines.attempt.time.process_time", lambda: 0.0)
    recorder = Recorder([])
    given = [client] if engine == "dask" else []
    carry_out(plan_for(dataset, chunks=7), dataset, result, *given, callbacks=[recorder])
    stalled, continued = recorder.of("stalled")
    assert f"process {os.getpid()} was stopped for " in stalled.reason
    assert stalled.stop - stalled.start == pytest.approx(0.5, abs=0.25)
    assert continued.reason == ""
    assert "was stopped for" in oocattn.report(result).attempts[-1].log[0].words


def test_one_of_two_workers_that_stands_still_is_told_while_the_other_works() -> None:
    tasks = {name: [Task(("stage", 0, lane), lane, ())] for lane, name in enumerate("ab")}
    found = {"b": Obstacle("is paused by Dask", "restart it")}

    def look(pending: object, workers: Sequence[str]) -> tuple[dict[str, Obstacle], dict[str, float]]:
        return {name: found[name] for name in workers if name in found}, dict.fromkeys(workers, math.inf)

    limits: Any = SimpleNamespace(stalled_seconds=1000.0, noticed_seconds=1000.0)
    recorder = Recorder([])
    watch = Standstill("ab", lambda: tasks, look, recorder, limits)
    for _ in range(4):
        watch.add(deadline.NOTICED_SECONDS / 2)
        watch.progress("a")
    (told,) = recorder.events
    assert told.reason.startswith("worker b is paused by Dask: ")
    gone = found.pop("b")  # which the attempt finds
    watch.add(deadline.NOTICED_SECONDS)
    watch.progress("b")
    found["b"] = gone
    assert recorder.events[-1].reason == ""
    with pytest.raises(StalledError, match="worker b is paused"):
        watch.add(1001.0)


def set_status(status: Status, dask_worker: Worker) -> None:
    dask_worker.status = status


@contextmanager
def paused(client: Client) -> Iterator[Callback]:
    """Once the run has begun: before that, a paused worker is refused."""

    def pause(event: Event) -> None:
        if event.kind == "started":
            client.run(set_status, Status.paused)

    try:
        yield pause
    finally:
        client.run(set_status, Status.running)


@contextmanager
def without_resources(client: Client) -> Iterator[Callback]:
    with dask.annotate(resources={"ELSEWHERE": 1}):
        yield ignore


BEGUN, END = threading.Semaphore(0), threading.Event()


def hold_thread() -> None:
    BEGUN.release()
    END.wait(60)


def ignore(event: Event) -> None:
    pass


@contextmanager
def busy(client: Client) -> Iterator[Callback]:
    """All threads of the workers execute tasks of somebody else."""
    END.clear()
    held = [client.submit(hold_thread, key=f"theirs-{number}") for number in range(sum(client.nthreads().values()))]
    try:
        for _ in held:
            assert BEGUN.acquire(timeout=30)
        yield ignore
    finally:
        END.set()
        client.gather(held)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (
            paused,
            r"worker inproc://\S+ is paused by Dask, at .* of its memory limit of .*: start workers with memory_limit=0",
        ),
        (without_resources, r"Dask gives subproblem \d+ of head group 0 \(state no-worker\) to no worker: .*resources"),
        (busy, r"worker inproc://\S+ is busy with tasks of others on all of its 8 threads: theirs-\d, .* and 5 more"),
    ],
    ids=["paused", "without resources", "busy"],
)
def test_a_run_that_stands_still_from_the_start_ends(
    client: Client, dataset: Path, right: Result, result: Path, kept: Keep, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = []

    def look(event: Event) -> None:
        if event.kind == "stalled":
            told.append(oocattn.status(result))

    caplog.set_level(logging.WARNING, "oocattn")
    ends = pytest.raises(StalledError, match=rf"nothing has ended for .*: ({words}).*on disk: resume")
    with kept(client) as keep, ends:
        carry_out(plan_for(dataset, chunks=7), dataset, result, client, callbacks=[keep, look])
    assert "the run stalls: " in caplog.text
    assert {status.state for status in told} == {"running"}
    assert str(told[0]).startswith("stalled: 0 of 7 subproblems")
    assert "no progress for" in str(told[0])
    assert " left" not in str(told[0])
    after = oocattn.status(result)
    assert (after.state, after.stalled) == ("interrupted", "")
    assert "it ended: StalledError: nothing has ended" in str(after)
    assert_same_bits(oocattn.resume(result, client=client), right)


def test_a_run_goes_on_when_its_worker_does(
    client: Client, dataset: Path, right: Result, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "STALLED_SECONDS", 60.0)
    monkeypatch.setattr("oocattn.pipelines.watch.status_file.WRITING_SECONDS", 0.0)
    told: list[tuple[str, str]] = []

    def listen(event: Event) -> None:
        if event.kind == "attended" and event.index == 3:
            client.run(set_status, Status.paused)
        if event.kind == "stalled":
            told.append((str(event.reason), oocattn.status(result).stalled))
            client.run(set_status, Status.running)

    found = carry_out(plan_for(dataset, chunks=7), dataset, result, client, callbacks=[listen])
    (first, told_first), (last, told_last) = told
    assert "is paused by Dask" in first
    assert (told_first, last, told_last) == (first, "", "")
    assert_same_bits(found, right)


@pytest.mark.parametrize("works", [True, False], ids=["works", "hangs"])
def test_a_task_may_take_longer_than_planned_while_its_lane_works(
    client: Client, dataset: Path, right: Result, result: Path, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, launch = Recorder([]), CpuDevice.launch

    def launch_slowly(device: CpuDevice, staged: StagedChunks, *rest: Any) -> Callable[[], Attended]:
        for _ in range(30 if staged.index == 3 else 0):
            time.sleep(deadline.NOTICED_SECONDS / 4)
            if works:
                device._health.step()
        return launch(device, staged, *rest)

    monkeypatch.setattr(CpuDevice, "launch", launch_slowly)
    plan = plan_for(dataset, chunks=7)
    if works:
        assert_same_bits(carry_out(plan, dataset, result, client, callbacks=[recorder]), right)
        assert not recorder.of("stalled")
    else:
        with pytest.raises(StalledError, match=r"subproblem \d of head group 0 does not end on worker inproc"):
            carry_out(plan, dataset, result, client, callbacks=[recorder])
        assert recorder.of("stalled")


def test_a_scheduler_that_does_not_answer_is_named(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstacles, "SOON_SECONDS", 0.2)

    def freeze(event: Event) -> None:
        if event.kind == "attended" and event.index == 3:
            client.loop.add_callback(threading.Event().wait, 1.5)

    with pytest.raises(StalledError, match="the scheduler does not answer: continue it"):
        carry_out(plan_for(dataset, chunks=7), dataset, result, client, callbacks=[freeze])


@pytest.fixture
def one_thread() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, memory_limit=0, dashboard_address=None) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


def test_a_task_cannot_start_a_run_that_waits_for_its_own_thread(
    one_thread: Client, dataset: Path, right: Result, result: Path
) -> None:
    options = {"chunks": 7, "kernel": "cpu"}

    def start(beside: bool) -> None:
        if beside:
            secede()  # as worker_client does
        with Client(get_worker().scheduler.address, set_as_default=False) as client:
            oocattn.attention(dataset, result, client=client, **options)

    with pytest.raises(StalledError, match=r"worker inproc://\S+ has one thread, which executes the task .*worker_client"):
        one_thread.submit(start, False, pure=False).result(timeout=60)
    assert_nothing_written(result)
    one_thread.submit(start, True, pure=False).result(timeout=60)
    assert_same_bits(oocattn.attention(dataset, result, **options), right)
