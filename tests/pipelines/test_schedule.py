"""Every subproblem is submitted once, in an order that each lane can follow, and lanes share the work evenly."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import GENEROUS, MACHINE, a_problem, with_partials

from oocattn import Plan
from oocattn.pipelines.schedule import CompletedWork, Schedule
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost
from oocattn.problem.given import GivenArrays


def plan_of(kv_heads: int, chunks: int, partials: str, decomposition: str = "cqs", causal: bool = True) -> Plan:
    problem = a_problem(1000, query_heads=kv_heads, kv_heads=kv_heads, causal=causal)
    budgets = {"device_memory": GENEROUS, "host_memory": GENEROUS}
    return with_partials(make_plan(problem, MACHINE, **budgets, chunks=chunks, decomposition=decomposition), partials)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 5), st.sampled_from(["cqs", "strips", "disk"]), st.booleans())
@settings(max_examples=100)
def test_everything_is_submitted_once_and_in_order(kv_heads: int, chunks: int, lanes: int, kind: str, causal: bool) -> None:
    partials, decomposition = ("disk", "cqs") if kind == "disk" else ("memory", kind)
    plan = plan_of(kv_heads, chunks, partials, decomposition, causal)
    schedule = Schedule(plan, lanes)
    order = list(schedule.order())
    assert sorted(order) == [(group, index) for group in range(kv_heads) for index in plan.division_of(0).indices]
    for lane in range(lanes):
        mine = [place for place in order if schedule.subproblem_lane(*place) == lane]
        assert mine == sorted(mine)  # a lane finishes a head group before it begins the next
    loads = Counter(schedule.subproblem_lane(*place) for place in order)
    if kind != "strips":
        most = -(-len(order) // lanes) if kind == "disk" else -(-kv_heads // lanes) * len(plan.division_of(0).indices)
        assert max(loads.values()) <= most


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_partials_in_memory_stay_on_their_lane(partials: str) -> None:
    plan = plan_of(4, 7, partials)
    schedule = Schedule(plan, 3)
    for group in range(4):
        lanes = {schedule.subproblem_lane(group, index) for index in range(7)}
        lanes |= {schedule.chunk_lane(group, chunk) for chunk in range(7)}
        assert len(lanes) == (1 if partials == "memory" else 3)


@given(st.integers(1, 60), st.integers(1, 5), st.booleans())
@settings(max_examples=100)
def test_lanes_share_the_strips_of_one_head(chunks: int, lanes: int, causal: bool) -> None:
    plan = plan_of(1, chunks, "memory", "strips", causal)
    schedule = Schedule(plan, lanes)
    pairs = Counter[int]()
    for chunk in range(chunks):
        lane = schedule.chunk_lane(0, chunk)
        pairs[lane] += chunk + 1 if causal else 1
        of_rows = {lane} if plan.query_rows(chunk) else set()
        assert {schedule.subproblem_lane(0, index) for index in plan.division_of(0).contributors(chunk)} == of_rows
    assert max(pairs.values()) <= pairs.total() / lanes + (2 * lanes if causal else 1)


@given(
    kv_heads=st.integers(1, 7),
    chunks=st.integers(1, 40),
    lanes=st.integers(1, 5),
    causal=st.booleans(),
    align_rows=st.sampled_from([1, 30, 300]),
    decomposition=st.sampled_from(["cqs", "strips"]),
)
@settings(max_examples=200)
def test_a_plan_knows_what_the_lane_with_most_to_do_computes(
    kv_heads: int, chunks: int, lanes: int, causal: bool, align_rows: int, decomposition: str
) -> None:
    """Also where the last chunks are short or empty, because chunks are of whole chunks of the input."""
    problem = a_problem(1000, query_heads=kv_heads, kv_heads=kv_heads, causal=causal)
    machine = replace(MACHINE, kernel_flops=1.0, half_rate_rows=0, lanes=lanes)  # so slow that calls cost nothing
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS, "chunks": chunks, "decomposition": decomposition}
    plan = make_plan(problem, machine, inputs=InputCost(align_rows=align_rows), **options)
    assume(plan.partials == "memory")
    schedule, pairs = Schedule(plan, lanes), Counter[int]()
    for group in range(kv_heads):
        for chunk in range(chunks):
            tokens = plan.query_rows(chunk)
            pairs[schedule.chunk_lane(group, chunk)] += sum(tokens) + len(tokens) if causal else 1000 * len(tokens)
    compute = next(link.seconds for link in plan.links if link.name == "compute")
    assert compute == pytest.approx(problem.flops * max(pairs.values()) / pairs.total() / machine.kernel_flops)


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes_take_turns(lanes: int) -> None:
    """Or one would wait until the window, which bounds what is submitted, has passed the work of another."""
    schedule = Schedule(plan_of(1, 24, "memory", "strips"), lanes)
    taking = [schedule.subproblem_lane(*place) for place in schedule.order()]
    assert all(set(taking[at : at + lanes]) == set(range(lanes)) for at in range(0, len(taking) // 2, lanes))


@given(
    kv_heads=st.integers(1, 4),
    chunks=st.integers(1, 30),
    align_rows=st.sampled_from([1, 30, 300]),
    kind=st.sampled_from(["cqs", "strips", "disk"]),
    data=st.data(),
)
@settings(max_examples=100)
def test_what_is_left_is_counted_as_it_is_submitted(
    kv_heads: int, chunks: int, align_rows: int, kind: str, data: st.DataObject
) -> None:
    """Also where the last chunks are empty, because chunks are of whole chunks of the input."""
    decomposition, partials = ("cqs", "disk") if kind == "disk" else (kind, "memory")
    problem = a_problem(1000, query_heads=kv_heads, kv_heads=kv_heads)
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS, "chunks": chunks, "decomposition": decomposition}
    plan = with_partials(make_plan(problem, MACHINE, inputs=InputCost(align_rows=align_rows), **options), partials)
    places = st.tuples(st.integers(0, kv_heads - 1), st.integers(0, chunks - 1))
    written = data.draw(st.sets(places))
    saved = {
        (group, chunk, index)
        for group, chunk in data.draw(st.sets(places))
        for index in plan.division_of(0).contributors(chunk)[: data.draw(st.integers(0, 3))]
    }
    schedule = Schedule(plan, 2, CompletedWork(written, saved))
    assert schedule.left == len(list(schedule.order()))


@given(
    used=st.lists(st.integers(0, 1000), min_size=3, max_size=3),
    chunks=st.integers(1, 12),
    lanes=st.integers(1, 4),
    kind=st.sampled_from(["cqs", "strips", "disk"]),
    data=st.data(),
)
@settings(max_examples=80)
def test_head_groups_with_different_divisions_are_scheduled_and_counted(
    used: list[int], chunks: int, lanes: int, kind: str, data: st.DataObject
) -> None:
    """Batch entries use different numbers of keys, some of them none."""
    decomposition, partials = ("cqs", "disk") if kind == "disk" else (kind, "memory")
    given_arrays = GivenArrays(seqused_k=np.array(used))
    problem = a_problem(1000, batch=3, query_heads=2, kv_heads=2, causal=False, given=given_arrays)
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS, "chunks": chunks, "decomposition": decomposition}
    plan = with_partials(make_plan(problem, MACHINE, **options), partials)
    everything = [(group, index) for group in range(6) for index in plan.division_of(group).indices]
    schedule = Schedule(plan, lanes)
    assert sorted(schedule.order()) == everything
    assert schedule.left == plan.subproblems == len(everything)
    unattended = [(group, chunk) for group in range(6) if not used[group // 2] for chunk in range(plan.query_chunks)]
    assert sorted(schedule.complete()) == [place for place in unattended if plan.query_rows(place[1])]
    if partials == "disk":
        loads = Counter(schedule.subproblem_lane(*place) for place in everything)
        assert max(loads.values(), default=0) <= len(everything) / lanes + 6
    written = data.draw(st.sets(st.tuples(st.integers(0, 5), st.integers(0, plan.query_chunks - 1))))
    begun = Schedule(plan, lanes, CompletedWork(written))
    assert begun.left == len(list(begun.order()))


@pytest.mark.parametrize("chunks", [7, 9507])
def test_what_is_left_of_very_many_heads_and_chunks_is_counted_soon(chunks: int) -> None:
    problem = a_problem(1 << 20, batch=2**20, query_heads=2**10, kv_heads=2**10)
    budgets = {"device_memory": 2**90, "host_memory": 2**90}
    plan = with_partials(make_plan(problem, MACHINE, **budgets, chunks=chunks, decomposition="cqs"), "disk")
    start = time.process_time()
    left = Schedule(plan, 1, CompletedWork({(5, chunk) for chunk in range(chunks)}, {(2**29, 1, 1)})).left
    assert left == chunks * (2**30 - 1)
    assert time.process_time() - start < 5
