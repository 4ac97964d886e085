"""Every subproblem is submitted once, in an order that each lane can follow, and lanes share the work evenly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GENEROUS, MACHINE, a_problem, with_partials

from oocattn import Plan
from oocattn.pipelines.schedule import Schedule
from oocattn.planner import make_plan


def plan_of(kv_heads: int, chunks: int, partials: str, causal: bool = True) -> Plan:
    problem = a_problem(1000, query_heads=kv_heads, kv_heads=kv_heads, causal=causal)
    made = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=chunks, decomposition="cqs")
    return with_partials(made, partials)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 5), st.sampled_from(["memory", "disk"]))
@settings(max_examples=60)
def test_everything_is_submitted_once_and_in_order(kv_heads: int, chunks: int, lanes: int, partials: str) -> None:
    plan = plan_of(kv_heads, chunks, partials)
    schedule = Schedule(plan, lanes)
    order = list(schedule.order())
    assert sorted(order) == [(group, index) for group in range(kv_heads) for index in range(plan.division.subproblems)]
    for lane in range(lanes):
        mine = [place for place in order if schedule.subproblem_lane(*place) == lane]
        assert mine == sorted(mine)  # a lane finishes a head group before it begins the next
    loads = Counter(schedule.subproblem_lane(*place) for place in order)
    most = -(-len(order) // lanes) if partials == "disk" else -(-kv_heads // lanes) * plan.division.subproblems
    assert max(loads.values()) <= most


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_partials_in_memory_stay_on_their_lane(partials: str) -> None:
    plan = plan_of(4, 7, partials)
    schedule = Schedule(plan, 3)
    for group in range(4):
        lanes = {schedule.subproblem_lane(group, index) for index in range(7)}
        lanes |= {schedule.chunk_lane(group, chunk) for chunk in range(7)}
        assert len(lanes) == (1 if partials == "memory" else 3)
