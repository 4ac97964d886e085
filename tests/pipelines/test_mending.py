"""A run goes on after a task that failed and a worker that died, gives the same bits, and says what happened."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from interrupting import kill_at, uninterrupted
from support import BESIDE, Recorder, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, TaskError, WorkerLostError
from oocattn.pipelines import attempt
from oocattn.pipelines.attempt import Attempt
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.lane.stager import Stager
from oocattn.storage.paths import ResultPaths


@pytest.fixture(autouse=True)
def _workers_are_often_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.2)


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


@pytest.fixture
def workers() -> Iterator[Client]:
    """Two worker processes, which are replaced when they die."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=4, processes=True, memory_limit=0, dashboard_address=None) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


class Failing:
    """Makes a method of a class fail for given (head group, index), so many times each; counts all calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, times: dict[tuple[int, int], int]) -> None:
        self.calls: Counter[tuple[int, int]] = Counter()
        real = getattr(owner, name)

        def method(it: Any, *arguments: Any) -> Any:
            place = self.place(*arguments)
            self.calls[place] += 1
            if self.calls[place] <= times.get(place, 0):
                raise OSError(5, f"Input/output error at {place}")
            return real(it, *arguments)

        monkeypatch.setattr(owner, name, method)

    @staticmethod
    def place(*arguments: Any) -> tuple[int, int]:
        first = arguments[0]
        return (first.head_group, first.subproblem.index) if hasattr(first, "subproblem") else (first, arguments[1])


STEPS = [(CpuDevice, "launch", "subproblem 5 of head group 1"), (Finisher, "write", "query chunk 5 of head group 1")]


@pytest.mark.parametrize(("owner", "name", "work"), STEPS)
@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_task_that_fails_is_tried_again(
    client: Client,
    dataset: Path,
    result: Path,
    partials: str,
    owner: type,
    name: str,
    work: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True, partials=partials)
    right = uninterrupted(plan, dataset)
    failing = Failing(monkeypatch, owner, name, {(1, 5): 2, (0, 9): 1})
    recorder = Recorder([])
    found = carry_out(plan, dataset, result, client, callbacks=[recorder])
    assert_same_bits(found, right)
    assert found.report.retried in (2, 3)  # 2 where two failed at the same time
    assert f"{found.report.retried} failed and were tried again" in str(found.report)
    assert failing.calls[1, 5] == 3
    told = [str(event.error) for event in recorder.of("recovered")]
    assert f"{work} failed: OSError: [Errno 5] Input/output error at (1, 5)" in told
    assert oocattn.status(result).state == "finished"
    # What lanes held is saved as they stop, so hardly anything but what failed is computed again.
    assert len(recorder.of("attended")) <= plan.subproblems + 3 * 4


def test_a_task_that_raises_a_key_error_is_tried_again(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Dask runs a task again, whose lane has done away with what it needs."""
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    real, calls = Lane.attend, Counter[int]()

    def attend(lane: Lane, turn: int) -> Event:
        calls[turn] += 1
        if turn == 4 and calls[turn] == 1:
            raise KeyError(turn)
        return real(lane, turn)

    monkeypatch.setattr(Lane, "attend", attend)
    recorder = Recorder([])
    found = carry_out(plan, dataset, result, client, callbacks=[recorder])
    assert_same_bits(found, right)
    (mended,) = recorder.of("recovered")
    assert "KeyError: 4" in str(mended.error)


def test_a_task_whose_result_is_lost_is_tried_again(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then Dask runs it again as well: that fails, and so does the gathering of its result."""
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    real, lost = Client.gather, []

    async def gather(connected: Client, futures: Any, **options: Any) -> object:
        event = await real(connected, futures, **options)
        if isinstance(event, Event) and event.kind == "attended" and event.index == 4 and not lost:
            lost.append(event)
            raise KeyError(4)
        return event

    monkeypatch.setattr(Client, "gather", gather)
    found = carry_out(plan, dataset, result, client)
    assert_same_bits(found, right)
    assert found.report.retried == len(lost) == 1


@pytest.mark.parametrize(("owner", "name", "work"), STEPS)
def test_a_task_that_fails_time_and_again_is_reported_and_the_run_can_be_resumed(
    client: Client, dataset: Path, result: Path, owner: type, name: str, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    with monkeypatch.context() as patched:
        failing = Failing(patched, owner, name, {(1, 5): 99})
        with pytest.raises(TaskError, match=rf"{work} failed: OSError: .*Input/output error") as failure:
            carry_out(plan, dataset, result, client)
        assert failure.value.work == work
        assert failing.calls[1, 5] == 3
    assert oocattn.status(result).state == "interrupted"
    assert f"it ended: TaskError: {work} failed" in str(oocattn.status(result))
    assert_same_bits(oocattn.resume(result, client=client), right)


@pytest.mark.parametrize(("partials", "decomposition"), [("memory", "cqs"), (None, "strips")])
def test_a_worker_that_dies_is_replaced(
    workers: Client, dataset: Path, result: Path, partials: str | None, decomposition: str
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True, partials=partials, decomposition=decomposition, lanes=2)
    right = uninterrupted(plan, dataset)
    before = workers.run(os.getpid)
    recorder = Recorder([])
    found = carry_out(plan, dataset, result, workers, callbacks=[recorder, kill_at(6, next(iter(before.values())))])
    assert_same_bits(found, right)
    assert found.report.workers_lost == 1
    assert found.report.lanes == 2
    assert "workers      1 lost; others took over" in str(found.report)
    (mended,) = recorder.of("recovered")
    assert f"worker {next(iter(before))} is gone" in str(mended.error)
    assert len(workers.run(os.getpid).keys() - before.keys()) == 1
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE


def test_workers_that_die_while_chunks_are_merged_do_not_end_a_run_that_gets_on(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=13, partials="disk")
    right = uninterrupted(plan, dataset)
    recorder, real = Recorder([]), Attempt._finish

    def lose(it: Attempt, *ended: Any) -> None:
        real(it, *ended)
        written = recorder.events[-1].kind == "written"
        if written and len(recorder.of("attended")) == plan.subproblems and len(recorder.of("recovered")) < 5:
            raise WorkerLostError("a worker is gone")

    monkeypatch.setattr(Attempt, "_finish", lose)
    found = carry_out(plan, dataset, result, callbacks=[recorder])
    assert_same_bits(found, right)
    assert found.report.workers_lost == 5


def lose_at(count: int, victim: str, cluster: LocalCluster) -> Callable[[Event], None]:
    """A listener that has the scheduler take a worker for lost at the `count`-th chunk that is written."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == "written":
            seen.append(event)
            if len(seen) == count:
                removed = cluster.scheduler.remove_worker(victim, stimulus_id="test")
                asyncio.run_coroutine_threadsafe(removed, cluster.loop.asyncio_loop).result()

    return listen


@pytest.mark.parametrize("counts", [(8, 13), pytest.param((5, 10, 16, 21), marks=pytest.mark.slow)])
def test_what_dask_runs_again_for_a_worker_that_died_is_not_done_again(
    dataset: Path, result: Path, client: Client, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    """Chunks that it had merged, of partials that the other one had computed: whose tasks are run again, too."""
    monkeypatch.setattr("oocattn.pipelines.engines.dask.engine.REPLACEMENT_SECONDS", 0.0)
    plan = plan_for(dataset, chunks=21, causal=True, partials="disk", lanes=2)
    right = uninterrupted(plan, dataset)
    real, staged = Stager._lay_out, Counter[tuple[Stager, int, int]]()

    def lay_out(stager: Stager, slot: Any, head_group: int, subproblem: Any, *rest: Any) -> Any:
        staged[stager, head_group, subproblem.index] += 1  # no id: it may be taken again
        return real(stager, slot, head_group, subproblem, *rest)

    monkeypatch.setattr(Stager, "_lay_out", lay_out)
    for count in counts:
        with (
            LocalCluster(n_workers=2, processes=False, memory_limit=0, dashboard_address=None) as cluster,
            Client(cluster) as workers,
        ):
            victim = sorted(workers.nthreads())[count // 4 % 2]
            assert_same_bits(
                carry_out(plan, dataset, result, workers, callbacks=[lose_at(count, victim, cluster)], overwrite=True), right
            )
    assert max(staged.values()) == 1


def test_what_a_worker_did_that_is_not_replaced_moves_on(
    dataset: Path, result: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oocattn.pipelines.engines.dask.engine.REPLACEMENT_SECONDS", 0.5)
    plan = plan_for(dataset, chunks=7, causal=True, lanes=2)
    right = uninterrupted(plan, dataset)
    with (
        LocalCluster(n_workers=2, processes=False, memory_limit=0, dashboard_address=None) as cluster,
        Client(cluster) as workers,
    ):

        def close_one(event: Event) -> None:
            if event.kind == "attended" and len(cluster.workers) == 2:
                cluster.scale(1)

        found = carry_out(plan, dataset, result, workers, callbacks=[close_one])
    assert_same_bits(found, right)
    assert found.report.lanes == 1


def test_a_run_that_loses_all_workers_or_its_scheduler_can_be_resumed(
    dataset: Path, fast_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oocattn.pipelines.engines.dask.engine.LAST_REPLACEMENT_SECONDS", 0.5)
    plan = plan_for(dataset, chunks=7, causal=True, partials="disk")
    right = uninterrupted(plan, dataset)
    for lost, words in (("workers", "all workers are gone"), ("scheduler", "the scheduler is gone")):
        result = fast_path / f"{lost}.zarr"
        with (
            LocalCluster(n_workers=1, processes=True, memory_limit=0, dashboard_address=None) as cluster,
            Client(cluster, timeout=1) as workers,
        ):

            def end(event: Event, cluster: LocalCluster = cluster, lost: str = lost) -> None:
                if event.kind == "attended" and cluster.workers and cluster.status.name == "running":
                    cluster.scale(0) if lost == "workers" else cluster.close(timeout=5)

            began = time.monotonic()
            with pytest.raises(WorkerLostError, match=words):
                carry_out(plan, dataset, result, workers, callbacks=[end])
            assert time.monotonic() - began < 40
        assert oocattn.status(result).state == "interrupted"
        assert_same_bits(oocattn.resume(result, client=client), right)
