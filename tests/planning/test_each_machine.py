"""Budgets are those of each machine, and its lanes share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import plan
from support import GPU, MACHINE, a_problem, replanned

from oocattn import BudgetError, Plan
from oocattn.planning.machine import Hardware
from oocattn.planning.what_if import what_if

PROBLEM = a_problem(1 << 16, query_heads=8, kv_heads=8, head_dim=64)


def over(machines: int, lanes_each: int, hardware: Hardware = MACHINE, budget: int = 1 << 30) -> Plan:
    """A plan over so many machines of as many lanes each."""
    spread = replace(hardware, lanes=machines * lanes_each, machine_lanes=lanes_each)
    return plan(PROBLEM, spread, chunks=31, host_memory=budget, device_memory=budget)


@pytest.mark.parametrize("hardware", [MACHINE, GPU])
def test_lanes_of_other_machines_take_nothing_of_a_budget(hardware: Hardware) -> None:
    alone = over(1, 2, hardware)
    spread, crowded = (replanned(alone, lanes=8, machine_lanes=each) for each in (2, 8))
    assert (spread.peak_host, spread.peak_device) == (alone.peak_host, alone.peak_device)
    assert spread.fits
    assert crowded.peak_host == 4 * spread.peak_host
    assert "on each machine" in str(spread)
    assert "at most 2 on a machine" in str(spread)
    assert "on each machine" not in str(crowded)


def test_a_budget_that_many_lanes_of_a_machine_exceed_is_enough_for_machines_of_one_lane() -> None:
    budget = over(1, 1).peak_host
    assert over(8, 1, budget=budget).lanes == 8
    with pytest.raises(BudgetError):
        over(1, 64, budget=budget)


def test_a_machine_has_room_for_as_many_lanes_as_its_budgets_hold() -> None:
    found = over(2, 2)
    tight = replace(found, host_memory=found.peak_host, device_memory=max(1, found.peak_device))
    roomy = replace(tight, host_memory=5 * found.peak_host // 2, device_memory=9 * max(1, found.peak_device))
    assert (tight.most_sharing_lanes, roomy.most_sharing_lanes) == (2, 5)


def test_alternatives_keep_the_memory_of_a_gpu() -> None:
    spread = over(2, 2, GPU, budget=4 << 30)
    found = {each.devices: each.plan for each in what_if(spread, GPU.scratch_bytes) if each.host_memory == 4 << 30}
    assert found[1] is not None
    assert found[8] is not None
    assert (found[1].device_memory, found[8].device_memory) == (2 << 30, 4 << 30)
