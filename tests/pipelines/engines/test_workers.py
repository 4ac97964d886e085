"""Workers that begin anew, hang, or still hold the lanes of a driver that is gone."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm
from distributed import Client, LocalCluster, Scheduler
from distributed.worker import Worker
from interrupting import interrupted, kill_at, uninterrupted
from support import Recorder, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset
from worker_processes import cluster_of, command, start

import oocattn
from oocattn import Event, TimeLimitError, clock
from oocattn.pipelines import attempt
from oocattn.pipelines.deadline import MARGIN_SECONDS
from oocattn.pipelines.engines.dask import cluster as cluster_module
from oocattn.pipelines.engines.dask import enlisting
from oocattn.pipelines.engines.dask.engine import DaskEngine, DaskLanes
from oocattn.pipelines.engines.dask.lane_plugin import LanePlugin
from oocattn.pipelines.existing import Request
from oocattn.pipelines.session import run_plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths

LATEST_SECONDS = 6.0  # after a time limit, on a busy machine: a frozen worker that is waited for keeps a run for 15 and more


@pytest.fixture(autouse=True)
def _workers_are_often_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.2)


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


@contextmanager
def processes(count: int, **options: object) -> Iterator[Client]:
    """Worker processes, which are replaced when they die."""
    with (
        LocalCluster(
            n_workers=count, **{"threads_per_worker": 4, "memory_limit": 0, "dashboard_address": None, **options}
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


def test_a_worker_that_begins_anew_at_its_old_address_has_no_lane(dataset: Path, result: Path, client: Client) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    with processes(1, worker_port="27341:27399") as workers:
        (before,) = workers.run(os.getpid).items()
        recorder = Recorder([])
        found = carry_out(plan, dataset, result, workers, callbacks=[recorder, kill_at(6, before[1])])
        (after,) = workers.run(os.getpid).items()
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert_same_bits(found, right)
    assert found.report.workers_lost == len(recorder.of("recovered")) == 1


def test_a_frozen_worker_does_not_outstay_a_time_limit(dataset: Path, result: Path, client: Client) -> None:
    plan = plan_for(dataset, chunks=7, causal=True, lanes=2)
    right = uninterrupted(plan, dataset)
    with processes(2) as workers:
        workers.run(importlib.import_module, "oocattn")  # which takes as long as the run may
        process = next(iter(workers.run(os.getpid).values()))
        seen = []

        def freeze(event: Event) -> None:
            if event.kind == "attended":
                seen.append(event)
                if len(seen) == 4:
                    os.kill(process, signal.SIGSTOP)

        until = clock.now() + MARGIN_SECONDS + 3
        try:
            with pytest.raises(TimeLimitError, match="time limit reached"):
                run_plan(
                    plan,
                    Request(plan.problem, Dataset.open(dataset), ResultPaths.at(result)),
                    DaskEngine(workers),
                    callbacks=[freeze],
                    until=until,
                )
            assert clock.now() < until + LATEST_SECONDS
        finally:
            os.kill(process, signal.SIGCONT)
    assert oocattn.status(result).state == "interrupted"
    assert oocattn.status(result).subproblems_done > 0
    assert_same_bits(oocattn.resume(result, client=client), right)


def test_a_worker_that_is_frozen_before_it_has_a_lane_does_not_hold_a_run(
    dataset: Path, result: Path, client: Client
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True, lanes=2)
    with processes(2) as workers:
        process = next(iter(workers.run(os.getpid).values()))
        os.kill(process, signal.SIGSTOP)
        until = clock.now() + MARGIN_SECONDS + 1.5
        try:
            with pytest.raises(TimeLimitError, match="time limit reached: 0 of 14 subproblems"):
                run_plan(
                    plan,
                    Request(plan.problem, Dataset.open(dataset), ResultPaths.at(result)),
                    DaskEngine(workers),
                    until=until,
                )
            assert clock.now() < until + LATEST_SECONDS
        finally:
            os.kill(process, signal.SIGCONT)


def test_workers_with_one_thread_go_on_at_once_when_another_is_lost(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps those of an adaptive cluster meanwhile may have that thread for a moment only."""
    monkeypatch.setattr(cluster_module, "KEEPING_SECONDS", 60.0)
    plan = plan_for(dataset, chunks=7, causal=True, lanes=2)
    recorder = Recorder([])
    with processes(2, threads_per_worker=1) as workers:
        process = next(iter(workers.run(os.getpid).values()))
        found = carry_out(plan, dataset, result, workers, callbacks=[recorder, kill_at(6, process)])
    assert_same_bits(found, uninterrupted(plan, dataset))
    (recovered,) = recorder.of("recovered")
    staged = [event for event in recorder.of("staged") if event.start > recovered.start]
    first = {worker: min(event.start for event in staged if event.worker == worker) for worker in {e.worker for e in staged}}
    assert max(first.values()) < recovered.stop + 20


def test_a_worker_that_dies_as_a_run_ends_is_not_waited_for(
    dataset: Path, result: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 30 s a scheduler tries to reach one that is gone."""
    plan = plan_for(dataset, chunks=7, causal=True, lanes=2)
    right = uninterrupted(plan, dataset)
    moments = []
    with processes(2) as workers:
        (address, process), *_ = workers.run(os.getpid).items()
        save = DaskLanes.save

        def kill_and_save(lanes: DaskLanes) -> int:
            os.kill(process, signal.SIGKILL)
            while address in workers.nthreads():
                time.sleep(0.1)
            moments.append(time.monotonic())
            return save(lanes)

        monkeypatch.setattr(DaskLanes, "save", kill_and_save)
        interrupted(plan, dataset, result, "attended", 6, client=workers)
        assert time.monotonic() - moments[0] < 20
    assert_same_bits(oocattn.resume(result, client=client), right)


def test_a_worker_that_dies_as_all_are_asked_is_not_waited_for(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, recorder = plan_for(dataset, chunks=7, causal=True, lanes=2), Recorder([])
    living_workers = enlisting.living_workers
    with processes(2) as workers:
        doomed = [next(iter(workers.run(os.getpid).items()))]

        def kill_one(client: Client, *seconds: float) -> list[str]:
            there = living_workers(client, *seconds)
            if doomed:
                address, process = doomed.pop()
                os.kill(process, signal.SIGKILL)
                while address in client.nthreads():
                    time.sleep(0.1)
            return there

        monkeypatch.setattr(enlisting, "living_workers", kill_one)
        began = clock.now()
        found = carry_out(plan, dataset, result, workers, callbacks=[recorder])
    assert recorder.of("started")[0].start - began < 20
    assert_same_bits(found, uninterrupted(plan, dataset))


DRIVE = """
import os, signal, sys
import oocattn
from distributed import Client
seen = []
def listen(event):
    seen.append(event.kind)
    if seen.count("attended") == 6:
        os.kill(os.getpid(), signal.SIGKILL)
address, dataset, result = sys.argv[1:]
options = {"causal": True, "chunks": 7, "kernel": "cpu"}
oocattn.attention(dataset, result, client=Client(address), callbacks=[listen], **options)
"""


def lanes_on(dask_worker: Worker) -> int:
    return sum(isinstance(plugin, LanePlugin) for plugin in dask_worker.plugins.values())


def wait_until_lanes_are_closed(workers: Client) -> None:
    began = time.monotonic()
    while any(workers.run(lanes_on).values()):
        assert time.monotonic() - began < 20
        time.sleep(0.1)


def test_lanes_are_closed_where_the_client_of_the_driver_is(dataset: Path, result: Path) -> None:
    with processes(1) as workers, Client(workers.scheduler.address, set_as_default=False) as other:

        def close(event: Event) -> None:
            if event.kind == "attended" and other.status == "running":
                other.close()

        with pytest.raises(oocattn.WorkerLostError):
            carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result, other, callbacks=[close])
        wait_until_lanes_are_closed(workers)


def test_a_worker_that_dies_before_it_has_a_lane_is_not_waited_for(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, open_lanes = plan_for(dataset, chunks=7, causal=True, lanes=2), DaskLanes.open
    with cluster_of(2) as (workers, ending):
        for _ in range(2):
            start(ending, command(workers.scheduler.address))
        workers.wait_for_workers(2)
        doomed = [next(iter(workers.run(os.getpid).values()))]

        def kill_one(lanes: DaskLanes) -> object:
            if doomed:
                os.kill(doomed.pop(), signal.SIGKILL)
                time.sleep(0.05)
            return open_lanes(lanes)

        monkeypatch.setattr(DaskLanes, "open", kill_one)
        recorder, began = Recorder([]), clock.now()
        found = carry_out(plan, dataset, result, workers, callbacks=[recorder])
    assert recorder.of("attended")[0].start - began < 20
    assert_same_bits(found, uninterrupted(plan, dataset))


def followed(dask_scheduler: Scheduler) -> list[str]:
    return [name for name in dask_scheduler.plugins if name.startswith("oocattn-lanes")]


@pytest.mark.parametrize("count", [1, 2])
def test_lanes_that_are_gone_are_not_followed_any_more(dataset: Path, result: Path, count: int) -> None:
    with processes(count) as workers:
        working = next(iter(workers.run(os.getpid).values()))
        plan = plan_for(dataset, chunks=7, causal=True, lanes=count)
        found = carry_out(plan, dataset, result, workers, callbacks=[kill_at(3, working)])
        assert workers.run_on_scheduler(followed) == []
    assert found.report is not None
    assert found.report.workers_lost == 1


def test_lanes_that_nobody_follows_are_closed_by_the_next_run(dataset: Path, result: Path, client: Client) -> None:
    options = {"causal": True, "chunks": 7, "kernel": "cpu"}
    right = oocattn.attention(dataset, result.with_name("right.zarr"), client=client, **options)
    with processes(1) as workers:
        drive = f"import oocattn.pipelines.engines.dask.engine as engine\nengine.follow_run = lambda *_: None\n{DRIVE}"
        assert warm.script(drive, workers.scheduler.address, str(dataset), str(result)).wait() == -signal.SIGKILL
        assert list(workers.run(lanes_on).values()) == [1]
        assert_same_bits(oocattn.resume(result, client=workers), right)
        assert list(workers.run(lanes_on).values()) == [0]


def test_lanes_of_a_driver_that_was_killed_are_closed(dataset: Path, result: Path, client: Client) -> None:
    options = {"causal": True, "chunks": 7, "kernel": "cpu"}
    right = oocattn.attention(dataset, result.with_name("right.zarr"), client=client, **options)
    with processes(1) as workers:
        assert warm.script(DRIVE, workers.scheduler.address, str(dataset), str(result)).wait() == -signal.SIGKILL
        assert oocattn.status(result).state == "interrupted"
        wait_until_lanes_are_closed(workers)
        assert_same_bits(oocattn.resume(result, client=workers), right)
        assert list(workers.run(lanes_on).values()) == [0]
