"""Workers of a machine with a small budget: they read about as many bytes as one worker, and compute the same bits."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from interrupting import kill_at
from support import Recorder, assert_same_bits, carry_out, normal_arrays, replanned, write_dataset

import oocattn
from oocattn import Event, Plan, Result
from oocattn.cores import Cores, usable_cores
from oocattn.pipelines.engines.dask import cluster
from oocattn.pipelines.engines.dask.cluster import find_cores, worker_addresses

BUDGET = 24 << 20
GENEROUS = 1 << 40


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    """12 MiB, of which a run reads 8 MiB of keys and values again and again."""
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(1 << 15, heads=1, head_dim=32))


@pytest.fixture(scope="module")
def alone(shared_path: Path, dataset: Path) -> tuple[Result, Plan]:
    """The result of one worker process, and its plan."""
    return run(dataset, shared_path / "alone.zarr", 1, processes=True)


def run(dataset: Path, result: Path, workers: int, *, processes: bool, budget: int = BUDGET) -> tuple[Result, Plan]:
    """The result of so many workers of one thread each, and its plan."""
    with workers_here(workers, processes=processes) as client:
        return attend(dataset, result, client, budget=budget)


@contextmanager
def workers_here(count: int, *, processes: bool, memory_limit: str | int = 0) -> Iterator[Client]:
    options = {"threads_per_worker": 1, "memory_limit": memory_limit, "dashboard_address": ":0", "processes": processes}
    with LocalCluster(n_workers=count, **options) as cluster, Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(count)
        yield client


def attend(
    dataset: Path, result: Path, client: Client, callbacks: Sequence[Callable[[Event], None]] = (), budget: int = BUDGET
) -> tuple[Result, Plan]:
    recorder = Recorder([])
    callbacks = [recorder, *callbacks]
    found = oocattn.attention(dataset, result, causal=True, host_memory=budget, client=client, callbacks=callbacks)
    started = recorder.of("started")[0]
    assert isinstance(started, oocattn.Started)
    return found, started.plan


@pytest.mark.parametrize("processes", [True, False])
@pytest.mark.parametrize("workers", [2, 8])
def test_workers_of_a_machine_read_hardly_more_than_one(
    dataset: Path, result: Path, alone: tuple[Result, Plan], workers: int, processes: bool
) -> None:
    one, _ = alone
    found, plan = run(dataset, result, workers, processes=processes)
    assert plan.peak_host <= BUDGET
    assert one.report is not None
    assert found.report is not None
    assert one.report.bytes_read > 2 * plan.problem.input_bytes
    assert found.report.bytes_read <= 1.15 * one.report.bytes_read


@pytest.mark.parametrize("processes", [True, False])
def test_a_large_budget_is_shared_by_all_workers(dataset: Path, result: Path, processes: bool) -> None:
    found, plan = run(dataset, result, 2, processes=processes, budget=1 << 30)
    assert found.report is not None
    assert (found.report.lanes, plan.machine.most_lanes) == (2, 0)
    assert plan.machine.locked_lanes == (1 if processes else 2)


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_the_plan_of_a_small_budget_gives_the_same_bits_on_any_number_of_lanes(
    dataset: Path, result: Path, alone: tuple[Result, Plan], lanes: int
) -> None:
    one, plan = alone
    spread = replanned(plan, lanes=lanes, most_lanes=0, host_memory=GENEROUS, device_memory=GENEROUS)
    with workers_here(lanes, processes=False) as client:
        found = carry_out(spread, dataset, result, client)
    assert found.report is not None
    assert one.report is not None
    assert found.report.lanes == lanes
    assert found.report.bytes_read == one.report.bytes_read
    assert_same_bits(found, one)


def test_a_worker_that_was_left_out_takes_over_from_one_that_dies(
    dataset: Path, result: Path, alone: tuple[Result, Plan]
) -> None:
    with workers_here(2, processes=True) as client:
        working = min(client.run(os.getpid).items())[1]  # the first address
        found, plan = attend(dataset, result, client, [kill_at(3, working)])
    assert found.report is not None
    assert (plan.lanes, found.report.workers_lost) == (1, 1)
    assert plan.digest == alone[1].digest
    assert_same_bits(found, alone[0])


def cores_found(client: Client) -> Cores | None:
    return find_cores(client, worker_addresses(client), lambda: None)


def test_workers_say_which_cores_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """First both all cores, then one each. Threads of this process say nothing."""
    processors = sorted(os.sched_getaffinity(0))
    with workers_here(2, processes=True) as client:
        assert cores_found(client) == (usable_cores().at_once, usable_cores().at_once, math.inf)
        for processor, worker in zip(processors[:2], worker_addresses(client), strict=False):
            client.run(os.sched_setaffinity, 0, {processor}, workers=[worker])
        different = {name for (name,), *_ in client.run(usable_cores).values()}
        assert cores_found(client) == (len(different), 1, math.inf)
        monkeypatch.setattr(cluster, "CORES_SECONDS", 3.0)
        process = client.run(os.getpid)[worker_addresses(client)[0]]
        os.kill(process, signal.SIGSTOP)  # the other one says what it may use
        try:
            assert cores_found(client) == (1, 1, math.inf)
        finally:
            os.kill(process, signal.SIGCONT)
    with workers_here(1, processes=False) as client:
        assert cores_found(client) is None


def test_workers_say_how_much_memory_dask_lets_them_have() -> None:
    with workers_here(2, processes=True, memory_limit="1GiB") as client:
        found = cores_found(client)
        imported = client.run(eval, "'torch' in __import__('sys').modules").values()
        used = client.run(lambda dask_worker: dask_worker.monitor.get_process_memory()).values()
    assert all(imported)  # what a run needs there counts as used
    assert found is not None
    assert found.memory == pytest.approx(0.8 * (1 << 30) - max(used), abs=32 << 20)
