"""Terms of a prediction, each by itself. What a plan makes of them is in `test_planner`."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support import GENEROUS, MACHINE, a_problem

from oocattn.planning.candidates import make_plan


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
