"""What a plan would be with other budgets and numbers of devices. Pure functions of records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from oocattn.errors import BudgetError
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import Hardware
from oocattn.planning.plan import Plan
from oocattn.problem.calls import CallSize
from oocattn.units import format_bytes, format_seconds

BUDGETS = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
"""Of the plan's host memory; on a CPU, whose device memory is part of it, of both."""

DEVICES = (1, 2, 4, 8)
"""Numbers of GPUs beside the plan's own, each with as much memory as one of the plan's has."""


@dataclass(frozen=True)
class Alternative:
    """The plan for a host memory in bytes and a number of devices; None where no plan fits."""

    host_memory: int
    devices: int
    plan: Plan | None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON-ready values: bytes and seconds, None of a plan that is not there."""
        given = {"host_memory": self.host_memory, "devices": self.devices}
        found = dict.fromkeys(("seconds", "read", "scratch_disk", "binds"))
        if (plan := self.plan) is not None:
            found = {
                "seconds": plan.seconds,
                "read": plan.link("read").amount,
                "scratch_disk": plan.scratch_disk,
                "binds": plan.binds,
            }
        return {**given, **found}

    def __str__(self) -> str:
        given = f"{format_bytes(self.host_memory):>12} {self.devices:>8}"
        if self.plan is None:
            return f"{given}   too small for any plan"
        plan = self.plan
        amounts = f"{format_bytes(plan.link('read').amount):>11} {format_bytes(plan.scratch_disk):>11}"
        return f"{given} {format_seconds(plan.seconds):>12} {amounts}  {plan.binds}"


def what_if(plan: Plan, scratch_bytes: Callable[[CallSize], int]) -> list[Alternative]:
    """The plans for smaller and larger budgets, and on GPUs for other numbers of them; chunks are left to each.

    `scratch_bytes` bounds the allocation of the plan's kernel.
    """
    numbers = sorted({plan.lanes, *DEVICES}) if plan.device == "cuda" else [plan.lanes]
    return [_alternative(plan, scratch_bytes, times, lanes) for lanes in numbers for times in BUDGETS]


def _alternative(plan: Plan, scratch_bytes: Callable[[CallSize], int], times: Fraction, lanes: int) -> Alternative:
    host_memory = max(1, int(plan.host_memory * times))
    if times == 1 and lanes == plan.lanes:
        return Alternative(host_memory, lanes, plan)
    on_cpu = plan.device == "cpu"
    shared = min(lanes, plan.machine.machine_lanes or lanes)
    device_memory = int(plan.device_memory * times) if on_cpu else plan.device_memory // plan.sharing_lanes * shared
    hardware = replace(Hardware(**asdict(plan.machine), scratch_bytes=scratch_bytes), lanes=lanes)
    try:
        found = make_plan(
            plan.problem,
            hardware,
            device_memory=max(1, device_memory),
            host_memory=host_memory,
            inputs=plan.inputs,
            checkpoint_seconds=plan.checkpoint_seconds,
            to_store=plan.to_store,
        )
    except BudgetError:
        return Alternative(host_memory, lanes, None)
    return Alternative(host_memory, lanes, found)


def table(alternatives: list[Alternative]) -> str:
    """Alternatives as lines below a heading."""
    heading = f"{'host memory':>12} {'devices':>8} {'seconds':>12} {'read':>11} {'scratch':>11}  binds"
    return "\n".join([heading, *map(str, alternatives)])
