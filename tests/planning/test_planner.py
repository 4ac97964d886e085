"""Planning is a pure function: what it promises is checked on machines and problems that are made up."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import MIB, budgets, check_the_smallest_budget, inputs, machines, plan, problems, smallest_named
from support import GPU, MACHINE, a_problem

from oocattn import BudgetError, ProblemError
from oocattn.division.quorums import candidate_chunk_counts
from oocattn.planning import candidates
from oocattn.planning.machine import Hardware, InputCost
from oocattn.problem.given import Array, GivenArrays
from oocattn.problem.problem import Problem


@given(problems(), machines, inputs, budgets, budgets)
@settings(max_examples=25)
def test_peaks_stay_within_the_budgets_or_the_smallest_that_works_is_named(
    problem: Problem, hardware: Hardware, cost: InputCost, device: int, host: int
) -> None:
    try:
        made = plan(problem, hardware, inputs=cost, device_memory=device, host_memory=host)
    except BudgetError:
        return
    assert made.peak_device <= device
    assert made.peak_host <= host
    assert made.read_factor >= 1
    assert made.scratch_disk <= hardware.scratch_disk
    assert made.peak_host >= hardware.lanes * 2 * made.slot_bytes
    assert made.chunk_rows * made.query_chunks >= problem.out_rows
    assert made.key_chunk_rows * made.chunks >= problem.keys
    assert made.chunk_rows % made.out_chunk_rows == 0
    assert sum(len(made.query_rows(chunk)) for chunk in range(made.query_chunks)) == problem.out_rows
    assert sum(len(made.key_rows(chunk)) for chunk in range(made.chunks)) == problem.keys
    assert made.seconds >= max(link.seconds for link in made.links)


@given(problems(), machines, st.sampled_from(["host_memory", "device_memory"]), st.sampled_from(["auto", "cqs", "strips"]))
@settings(max_examples=15)
def test_the_smallest_budget_that_is_named_works_and_one_mebibyte_less_does_not(
    problem: Problem, hardware: Hardware, name: str, decomposition: str
) -> None:
    check_the_smallest_budget(problem, hardware, name, decomposition)


@given(problems(), machines, budgets, st.sampled_from(["cqs", "strips"]))
@settings(max_examples=15)
def test_a_preferred_division_is_chosen_where_it_costs_little(
    problem: Problem, hardware: Hardware, host: int, kind: str
) -> None:
    try:
        free, found = (plan(problem, hardware, host_memory=host, preferred=each) for each in (None, kind))
    except BudgetError:
        return
    if found != free:
        assert (found.decomposition, found.partials) == (kind, "memory")
        assert found.seconds <= 1.25 * free.seconds
        assert found.peak_host <= host


def test_several_devices_on_one_head_keep_to_strips_whatever_is_preferred() -> None:
    """Quorums of one head have their partials on disk there, for any lane may have a part of each."""
    one, four = a_problem(1 << 24, batch=1, query_heads=1, kv_heads=1), replace(GPU, lanes=4)
    assert [plan(one, GPU, preferred=kind).decomposition for kind in ("cqs", "strips")] == ["cqs", "strips"]
    assert plan(one, four, decomposition="cqs").partials == "disk"
    assert plan(one, four, preferred="cqs") == plan(one, four, decomposition="strips")


def test_two_budgets_too_small_are_named_one_after_the_other() -> None:
    options = {"device_memory": 1, "host_memory": 1}
    for expected in ("device_memory", "host_memory"):
        with pytest.raises(BudgetError) as refused:
            plan(a_problem(1 << 20), **options)
        name, options[expected] = smallest_named(refused.value)
        assert name == expected
    assert plan(a_problem(1 << 20), **options).peak_host <= options["host_memory"]


def test_no_room_for_partials_on_disk_is_said() -> None:
    problem = a_problem(1 << 22, batch=1, query_heads=8, kv_heads=8, head_dim=128, causal=False)
    with pytest.raises(BudgetError) as refused:
        plan(problem, decomposition="cqs", host_memory=1)
    smallest = smallest_named(refused.value)[1]
    assert plan(problem, decomposition="cqs", host_memory=smallest).partials == "disk"
    full = replace(MACHINE, scratch_disk=0)
    with pytest.raises(BudgetError, match=r"partials need at least .* of scratch on disk and 0 B is free beside the result"):
        plan(problem, full, decomposition="cqs")
    with pytest.raises(BudgetError, match="smallest that works is"):
        plan(problem, full, decomposition="cqs", host_memory=smallest, checkpoint_seconds=0.0)
    assert plan(problem, full, checkpoint_seconds=0.0).scratch_disk == 0


@pytest.mark.parametrize("causal", [False, True])
def test_a_billion_tokens_are_planned_in_a_second(causal: bool) -> None:
    problem = a_problem(10**9, query_heads=8, kv_heads=8, causal=causal)
    tracemalloc.start()
    began = time.process_time()
    made = plan(problem, device_memory=16 << 30, host_memory=64 << 30)
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.peak_host <= 64 << 30
    assert peak < 100 * MIB
    assert seconds < 5  # tracing makes it several times slower
    began = time.process_time()
    plan(problem, device_memory=16 << 30, host_memory=64 << 30)
    assert time.process_time() - began < 1


def test_quorums_come_before_strips_on_ties() -> None:
    compute_bound = replace(MACHINE, kernel_flops=1e13, read_rate=1e12, write_rate=1e12, task_seconds=1e-9)
    problem = a_problem(1 << 20)
    quorums, strips = (plan(problem, compute_bound, decomposition=kind) for kind in ("cqs", "strips"))
    assert strips.seconds / 1.05 < quorums.seconds < strips.seconds * 1.05
    assert plan(problem, compute_bound).decomposition == "cqs"


def test_strips_come_first_where_they_are_faster() -> None:
    """Small budget, slow disk: quorums write every partial and read it again, strips hold one query chunk."""
    machine = replace(MACHINE, kernel_flops=1e15, read_rate=2e9, write_rate=2e8, task_seconds=1e-9)
    problem = a_problem(1 << 20, head_dim=128, causal=False)
    options = {"host_memory": 64 * MIB}
    quorums, strips = (plan(problem, machine, decomposition=kind, **options) for kind in ("cqs", "strips"))
    assert strips.seconds * 1.05 < quorums.seconds
    assert plan(problem, machine, **options) == strips


def test_reading_from_the_page_cache_takes_nothing_from_the_disk() -> None:
    """Of two links as long as each other, one is behind the other."""
    machine = replace(MACHINE, kernel_flops=1e18, read_rate=1e9, write_rate=1e9, task_seconds=1e-9)
    problem, options = a_problem(1 << 20, head_dim=128, causal=False), {"chunks": 1, "decomposition": "cqs"}
    apart, shared = (plan(problem, replace(machine, from_disk=value), **options) for value in (False, True))
    read, write = apart.link("read").seconds, apart.link("write").seconds
    assert min(read, write) > 0.2
    assert shared.seconds - apart.seconds == pytest.approx(min(read, write))


@given(problems(), st.integers(1, 200), st.sampled_from(["cqs", "strips"]))
@settings(max_examples=50)
def test_chunks_and_decomposition_can_be_pinned(problem: Problem, chunks: int, decomposition: str) -> None:
    chunks = min(chunks, problem.keys)
    made = plan(problem, chunks=chunks, decomposition=decomposition)
    assert (made.chunks, made.decomposition) == (chunks, decomposition)
    for head_group in range(problem.head_groups):
        live = made.division_of(head_group).live
        assert (live.query_chunks, live.key_chunks) == (made.query_chunks, chunks)
    if decomposition == "cqs":
        assert made.query_chunks == chunks


def test_what_cannot_be_pinned_is_refused() -> None:
    for chunks in (0, -1, 101):
        with pytest.raises(ProblemError, match=rf"chunks = {chunks}: expected 1 to 100 for 100 keys"):
            plan(a_problem(100), chunks=chunks)
    with pytest.raises(ProblemError, match="decomposition = 'rings': expected one of auto, cqs, strips"):
        plan(a_problem(100), decomposition="rings")


def test_a_free_choice_of_quorums_is_perfect() -> None:
    for power in range(26, 40):
        made = plan(a_problem(1 << 22), decomposition="cqs", host_memory=1 << power)
        assert made.chunks in candidate_chunk_counts(made.chunks)


def test_no_subproblem_takes_longer_than_a_checkpoint_where_there_is_a_choice() -> None:
    slow = replace(MACHINE, kernel_flops=1e10)
    made = plan(a_problem(1 << 18), slow)
    compute = next(link for link in made.links if link.name == "compute")
    assert compute.seconds > 60
    assert compute.seconds / made.subproblems <= 60


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("chunks", "decomposition"), [(1, "cqs"), (7, "cqs"), (8, "cqs"), (31, "cqs"), (9, "strips")])
def test_bytes_to_read_are_those_of_every_subproblem(causal: bool, chunks: int, decomposition: str) -> None:
    problem = a_problem(31 * 9 * 8 * 7, query_heads=6, kv_heads=2, causal=causal)
    made = plan(problem, chunks=chunks, decomposition=decomposition)
    row = problem.head_dim * problem.itemsize
    total = 0
    division = made.division_of(0)
    for index in division.indices:
        part = division.subproblem(index)
        staged = row * made.chunk_rows * (3 * len(part.query_chunks) + 2 * len(part.key_chunks))
        assert staged <= made.slot_bytes
        total += staged
    link = next(link for link in made.links if link.name == "read")
    assert link.amount == 2 * total
    assert made.subproblems == 2 * len(division.indices)


def test_slow_decoding_bounds_reading_and_is_noted() -> None:
    problem = a_problem(1 << 16)
    cost = InputCost(decode_bytes=100 * MIB, decode_rate=1e8, align_rows=5000, notes=("k is zstd-compressed",))
    fast, slow = plan(problem, chunks=7), plan(problem, chunks=7, inputs=cost)
    reading = [next(link for link in made.links if link.name == "read") for made in (fast, slow)]
    assert reading[1].seconds >= 9 * reading[0].seconds
    assert slow.peak_host >= fast.peak_host + 100 * MIB
    assert slow.chunk_rows % 5000 == 0
    assert "note: k is zstd-compressed" in str(slow)


def test_more_lanes_take_more_memory_and_less_time() -> None:
    problem = a_problem(1 << 20, query_heads=8, kv_heads=8)
    one, four = (plan(problem, replace(MACHINE, lanes=lanes), chunks=13) for lanes in (1, 4))
    assert four.peak_host == 4 * one.peak_host
    assert four.seconds < one.seconds / 2


def test_many_lengths_of_keys_are_planned_as_fast_as_a_few() -> None:
    """A plan is chosen by sixteen of the lengths; its pairs are those of all."""
    lengths = np.arange(1, 4097, 8)
    problem = a_problem(4096, batch=len(lengths), causal=True, given=GivenArrays(seqused_k=lengths))
    began = time.process_time()
    found = plan(problem, device_memory=16 * MIB, host_memory=64 * MIB)
    assert time.process_time() - began < 5
    assert found.problem.pairs == int((lengths * (lengths + 1) // 2).sum())
    assert found.subproblems == sum(len(found.division_of(group).indices) for group in range(problem.head_groups))


def _documents(queries: list[int], keys: list[int], slopes: Array | None = None, **asked: Any) -> Problem:
    """Packed documents of so many rows and keys."""
    given = GivenArrays(np.cumsum([0, *queries]), np.cumsum([0, *keys]), alibi_slopes=slopes)
    options = {"causal": False, "given": given, "digests": given.digests, **asked}
    return a_problem(sum(queries), keys=sum(keys), **options)


@pytest.mark.parametrize(("hardware", "link"), [(MACHINE, "tasks"), (GPU, "read")], ids=["cpu", "gpu"])
def test_keys_that_are_read_apart_are_in_the_price(hardware: Hardware, link: str) -> None:
    """Of the same rows and pairs, in two orders of documents: those without queries lie between others, or behind them."""
    mixed, sorted_out = _documents([4, 0] * 2000, [4, 4] * 2000), _documents([4] * 2000 + [0] * 2000, [4] * 4000)
    apart, together = (
        next(each.seconds for each in plan(problem, hardware, chunks=1).links if each.name == link)
        for problem in (mixed, sorted_out)
    )
    assert 0.1 < apart - together < 10


def test_documents_of_many_shapes_cost_a_call_each() -> None:
    """Those of one shape are attended together."""
    lengths = [*range(1, 200)] * 2
    equal, different = (
        next(each.seconds for each in plan(_documents(rows, rows), chunks=1).links if each.name == "compute")
        for rows in ([100] * len(lengths), lengths)
    )
    assert different > 3 * equal


@pytest.mark.parametrize(("hardware", "milliseconds"), [(MACHINE, 0.55), (GPU, 0.2)], ids=["cpu", "gpu"])
def test_a_kernel_call_for_each_gap_within_a_document_is_in_the_price(hardware: Hardware, milliseconds: float) -> None:
    """Where heads have slopes: of 500 documents, keys of two lie side by side, but those of one have a gap."""
    asked = {"causal": True, "window_size": (2, 0), "sink_tokens": 1}
    joined, apart = (
        next(each.seconds for each in plan(problem, hardware, chunks=1).links if each.name == "compute")
        for problem in (_documents([3] * 500, [9] * 500, slopes, **asked) for slopes in (None, np.ones(1, np.float32)))
    )
    assert apart - joined > 0.45 * milliseconds


@pytest.mark.parametrize("host_memory", [24 * MIB, 48 * MIB])
@pytest.mark.parametrize("changed", [{}, {"kernel_flops": 1e7}, {"write_rate": 1e4}], ids=str)
def test_plans_that_are_left_out_are_never_the_best(
    monkeypatch: pytest.MonkeyPatch, host_memory: int, changed: dict[str, float]
) -> None:
    problem, machine = a_problem(8000, query_heads=8, kv_heads=2), replace(MACHINE, **changed)
    options: dict[str, Any] = {"host_memory": host_memory, "decomposition": "cqs", "checkpoint_seconds": 10.0}
    found = plan(problem, machine, **options)
    monkeypatch.setattr(candidates, "_is_settled", lambda plan: False)
    assert found == plan(problem, machine, **options)
