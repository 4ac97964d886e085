"""Lanes of a machine that share a small budget: as few as read about as many bytes as one, where that costs no time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from support import GPU, MACHINE, a_problem, read_again, replanned

from oocattn import BudgetError, Plan
from oocattn.cores import Cores, UsableCores
from oocattn.planning.budgets import is_hopeless
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import Hardware
from oocattn.planning.sharing import cores_of_lanes, lane_threads, share_machine
from oocattn.planning.stored_plan import read_plan
from oocattn.problem.problem import Problem
from oocattn.records import to_json

MIB = 1 << 20
CORES = 8
RATE = 8e10
"""Operations per second of a core."""


def workers(count: int, cores: Cores = Cores(CORES, CORES), hardware: Hardware = MACHINE) -> Hardware:  # noqa: B008 - frozen
    """A machine of so many workers, or several of which `hardware` says how many are on each."""
    sharing = hardware.machine_lanes or count
    made = replace(hardware, lanes=count, threads=lane_threads(cores, sharing), cores=cores.machine)
    return made if hardware.device == "cuda" else replace(made, kernel_flops=RATE * made.lane_cores)


def shared(problem: Problem, hardware: Hardware, memory: int, cores: Cores = Cores(CORES, CORES)) -> Plan:  # noqa: B008
    return share_machine(hardware, cores, (memory, memory), partial(make_plan, problem))


def read(plan: Plan) -> float:
    return plan.link("read").amount


def floats(tokens: int) -> Problem:
    """A causal head of float32."""
    return a_problem(tokens, dtype="float32", head_dim=32)


@pytest.mark.parametrize(
    ("cores", "tokens", "memory"), [(2, 1 << 15, 24), (2, 1 << 17, 64), (8, 1 << 15, 48), (8, 1 << 17, 64), (8, 1 << 18, 96)]
)
def test_lanes_of_a_small_budget_read_hardly_more_than_one(cores: int, tokens: int, memory: int) -> None:
    problem, there = floats(tokens), Cores(cores, cores)
    alone = shared(problem, workers(1, there), memory * MIB, there)
    for count in (2, 4, 8):
        found = shared(problem, workers(count, there), memory * MIB, there)
        assert found.peak_host <= memory * MIB
        assert read(found) <= 1.15 * read(alone)
        assert found.seconds <= 1.1 * alone.seconds
        assert found.most_sharing_lanes == found.lanes
        assert found.lanes * found.threads <= max(cores, found.lanes)


def test_no_lane_is_left_out_whose_cores_the_others_may_not_use() -> None:
    """Jobs of one core each, on one host."""
    problem, apart = floats(1 << 17), Cores(machine=CORES, lane=1)
    few = shared(problem, workers(8, apart), 192 * MIB, apart)
    assert (few.lanes, few.threads) == (8, 1)
    assert read(few) > 1.15 * read(shared(problem, workers(1, apart), 192 * MIB, apart))
    assert shared(problem, workers(8), 192 * MIB).lanes == 1


def test_no_lane_has_more_memory_than_dask_lets_its_worker_have() -> None:
    """A LocalCluster gives each of its workers an equal part of the machine's memory."""
    problem = floats(1 << 17)
    for left in (24 * MIB, 48 * MIB, 96 * MIB):
        cores = Cores(CORES, CORES, memory=left)
        found = shared(problem, workers(8, cores), 192 * MIB, cores)
        assert found.peak_host <= left * found.sharing_lanes or found.lanes == 8
        assert found.lanes > 1
    assert shared(problem, workers(8), 192 * MIB).lanes == 1


def test_workers_are_not_left_out_where_files_take_most_of_the_time() -> None:
    """However that is, the plan of all of them is the one that `make_plan` makes of as many."""
    problem, slow = floats(1 << 15), replace(workers(8), file_seconds=1.0)
    options = {"device_memory": 1 << 40, "host_memory": 1 << 40, "chunks": 64}
    expected = make_plan(problem, slow, **options)
    assert is_hopeless(expected)
    found = share_machine(slow, Cores(CORES, CORES), (1 << 40, 1 << 40), partial(make_plan, problem, chunks=64))
    assert found == expected


def test_lanes_have_no_more_threads_than_their_processes_may_use() -> None:
    problem, pairs = floats(1 << 18), Cores(machine=CORES, lane=2)
    for memory in (64, 96, 128, 192):
        found = shared(problem, workers(8, pairs), memory * MIB, pairs)
        assert found.threads <= 2


def test_lanes_share_the_cores_of_a_machine_that_has_fewer() -> None:
    """One core: eight lanes compute what one does, and so does one that is given the work of all."""
    problem, single = floats(1 << 17), Cores(1, 1)
    eight, one = (make_plan(problem, workers(lanes, single), device_memory=1 << 40, host_memory=1 << 40) for lanes in (8, 1))
    assert eight.link("compute").seconds >= one.link("compute").seconds
    assert shared(problem, workers(8, single), 192 * MIB, single).lanes == 1


def test_what_python_takes_is_shared_by_no_more_cores_than_there_are() -> None:
    problem = floats(1 << 15)
    spread = replanned(make_plan(problem, workers(8), device_memory=1 << 40, host_memory=1 << 40), kernel_flops=1e9)
    crowded = replanned(spread, cores=2)
    assert crowded.seconds > spread.seconds
    assert replanned(spread, cores=0).seconds == spread.seconds


@pytest.mark.parametrize("hardware", [MACHINE, GPU])
def test_a_large_budget_is_shared_by_all_workers(hardware: Hardware) -> None:
    found = shared(floats(1 << 16), workers(8, hardware=hardware), 1 << 40)
    assert (found.lanes, found.machine.most_lanes) == (8, 0)


def test_gpus_are_not_left_out() -> None:
    problem, memory = a_problem(1 << 24), 8 << 30
    found = shared(problem, workers(8, hardware=GPU), memory)
    assert (found.lanes, found.machine.most_lanes) == (8, 0)
    assert read(found) > 1.15 * read(shared(problem, workers(1, hardware=GPU), memory))


def test_each_machine_has_its_own_lanes() -> None:
    problem = floats(1 << 18)
    found = shared(problem, workers(32, hardware=replace(MACHINE, machine_lanes=8)), 96 * MIB)
    assert (found.lanes, found.sharing_lanes) == (4, 1)
    assert replace(found, host_memory=1 << 40, device_memory=1 << 40).most_sharing_lanes == 1  # whatever there is room for
    left_out = "; the other workers are left out, for the budget is small"
    assert f"4 lanes, at most 1 on a machine, {found.threads} threads each{left_out}" in str(found)


def test_threads_that_would_take_the_memory_of_chunks_are_left_out() -> None:
    problem, memory = floats(1 << 15), 32 * MIB
    with pytest.raises(BudgetError):
        shared(problem, workers(1), memory)
    found = shared(problem, workers(8), memory)
    assert found.lanes == 1
    assert 1 < found.threads < CORES


def test_plans_with_fewer_lanes_are_read_again_and_so_are_those_of_older_versions() -> None:
    found = shared(floats(1 << 17), workers(8), 64 * MIB)
    assert (found.machine.most_lanes, found.machine.cores) == (1, CORES)
    assert read_again(found) == found
    older = make_plan(floats(1 << 15), replace(MACHINE, lanes=8), device_memory=1 << 40, host_memory=1 << 40)
    content = to_json(older)
    del content["machine"]["most_lanes"], content["machine"]["cores"]
    assert read_plan(content, lambda *_: MACHINE.scratch_bytes, lambda _: older.problem.given) == older


def test_a_budget_that_is_enough_for_no_lane_is_refused() -> None:
    with pytest.raises(BudgetError, match="the smallest that works is"):
        shared(floats(1 << 16), workers(16), MIB)


@pytest.mark.parametrize(
    ("found", "here", "threads", "count", "expected"),
    [
        (None, 8, 8, 2, (8, 8)),
        (Cores(64, 16), 2, 2, 4, (64, 16)),  # the driver's machine is a small one
        (Cores(8, 8), 8, 1, 1, (1, 8)),  # OMP_NUM_THREADS=1
        (Cores(8, 8), 8, 1, 4, (4, 8)),
        (None, 2, 4, 1, (2, 2)),  # more threads than cores
    ],
)
def test_cores_are_those_found_and_no_more_than_the_caller_lets_pytorch_have(
    found: Cores | None, here: int, threads: int, count: int, expected: tuple[int, int]
) -> None:
    assert cores_of_lanes(found, UsableCores((), here), threads, count)[:2] == expected
