"""Terms of a prediction, each by itself. What a plan makes of them is in `test_planner`."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support import GENEROUS, MACHINE, a_problem

from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost
from oocattn.planning.memory import SLOTS_AHEAD, STAGING_SLOTS
from oocattn.planning.plan import Plan
from oocattn.planning.waiting import COMMITS


def test_a_window_takes_as_many_library_calls_as_a_triangle() -> None:
    """Its two ends have twice as many parts, which lie evenly apart, so that the kernel joins them."""

    def seconds_beside_products(**asked: Any) -> float:
        problem = a_problem(65_536, **asked)
        plan = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1, decomposition="cqs")
        rate = MACHINE.kernel_flops * 65_536 / (65_536 + MACHINE.half_rate_rows)
        return plan.link("compute").seconds - problem.flops / rate

    of_triangle = seconds_beside_products()
    assert of_triangle > 0
    assert seconds_beside_products(window_size=(4095, None)) == pytest.approx(of_triangle)
    assert seconds_beside_products(causal=False, window_size=(2047, 2047)) == pytest.approx(of_triangle)


def test_a_part_of_the_rows_is_planned_in_a_second() -> None:
    """A triangle that is cut off has live pairs that are counted one by one."""
    problem = a_problem(32_768, query_heads=2, kv_heads=2, rows_asked=(0, 16_384))
    began = time.process_time()
    make_plan(problem, MACHINE, device_memory=48 << 20, host_memory=48 << 20)
    assert time.process_time() - began < 2


def plan_of(chunks: int, *, to_store: bool = False, latency: float = 0.1, **asked: Any) -> Plan:
    """A plan of so many strips, whose inputs are in a store of 50 MB/s that lets each request wait."""
    inputs = InputCost(decode_bytes=1 << 20, decode_rate=50e6, align_rows=512, ahead=1 << 24, latency=latency)
    pinned = {"chunks": chunks, "decomposition": "strips", "inputs": inputs, "to_store": to_store}
    return make_plan(a_problem(65_536, **asked), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, **pinned)


def test_small_subproblems_wait_for_a_store_longer_than_for_its_bytes() -> None:
    few, many = plan_of(2), plan_of(256)
    least = few.problem.input_bytes / 50e6
    assert few.link("read").seconds < 1.6 * least  # keys are read for both strips, and half of them once more
    assert many.link("read").seconds >= many.subproblems * 0.1 / SLOTS_AHEAD
    assert plan_of(2, latency=1.0).link("read").seconds > few.link("read").seconds  # each has the store's rate by half


def test_slots_that_are_filled_ahead_of_a_store_are_counted() -> None:
    problem, pinned = a_problem(65_536), {"chunks": 4, "decomposition": "strips", "device_memory": GENEROUS}
    here, there = (
        make_plan(problem, MACHINE, host_memory=GENEROUS, inputs=InputCost(ahead=ahead), **pinned) for ahead in (0, 1 << 24)
    )
    assert there.slot_bytes == here.slot_bytes
    assert there.peak_host - here.peak_host == (SLOTS_AHEAD - STAGING_SLOTS["cpu"]) * here.slot_bytes
    assert there.buffers.slots == SLOTS_AHEAD


def test_chunks_at_the_edge_of_a_window_count_where_they_are_decoded() -> None:
    """Of a window of 16 keys before each row, a chunk of 512 keys is decoded for each chunk of 512 rows besides its own."""
    asked: dict[str, Any] = {"window_size": (16, None), "latency": 0.0}
    fine, coarse = plan_of(128, **asked), plan_of(1, **asked)
    row_bytes = fine.problem.kv_row_bytes
    assert coarse.link("read").seconds == pytest.approx(fine.problem.input_bytes / 50e6, rel=0.01)
    assert fine.link("read").seconds - coarse.link("read").seconds == pytest.approx(127 * 512 * row_bytes / 50e6, rel=0.01)


def test_a_result_is_sent_at_the_rate_of_the_store_of_the_inputs() -> None:
    here, there = plan_of(4), plan_of(4, to_store=True)
    assert there.link("write").seconds >= there.link("write").amount / 50e6
    assert there.seconds - here.seconds > COMMITS * 0.1
    assert there.peak_host > here.peak_host
