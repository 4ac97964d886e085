"""Plans read from files: their numbers must be those that the planner computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from oocattn.planning.cost import recost
from oocattn.planning.machine import ScratchBytes
from oocattn.planning.options import MAX_CHUNKS, MAX_SUBPROBLEMS
from oocattn.planning.plan import Plan
from oocattn.problem.problem import check_problem
from oocattn.records import from_json


def read_plan(content: object, scratch_of: Callable[[str, str], ScratchBytes] | None) -> Plan:
    """Read and check the plan that `Plan.to_json` wrote; ValueError for what no plan would be.

    `scratch_of(kernel, device)` bounds a kernel's allocation; without it the numbers that follow from that are believed.
    """
    plan = from_json(Plan, content)
    check_problem(plan.problem)
    _check_choices(plan)
    recosted = plan if scratch_of is None else recost(plan, scratch_of(plan.kernel, plan.device))
    found, expected = plan.to_json(), recosted.to_json()
    for name, value in expected.items():
        if not _same(value, found[name]):
            raise ValueError(f"its {name.replace('_', ' ')} does not follow from the rest of the plan")
    if not plan.fits:
        raise ValueError("its peak memory is beyond its budgets")
    return plan


def _check_choices(plan: Plan) -> None:
    """Raise ValueError where no plan would have been chosen so."""
    limit = min(plan.problem.tokens, MAX_CHUNKS)
    strips = plan.decomposition == "strips"
    if plan.chunks > limit:
        raise ValueError(f"{plan.chunks:,} chunks: expected {limit:,} at most")
    if plan.span > plan.chunks or strips != (plan.span > 0):
        raise ValueError(f"strips of {plan.span:,} of {plan.chunks:,} chunks")
    if plan.division.subproblems > MAX_SUBPROBLEMS:
        raise ValueError(f"{plan.division.subproblems:,} subproblems of a head group: expected {MAX_SUBPROBLEMS:,} at most")
    if plan.accumulators > 3 * plan.chunks + 4 or (strips and plan.partials == "disk"):
        raise ValueError(f"{plan.accumulators:,} accumulators, partials in {plan.partials}")
    if max(plan.tiles.query, plan.tiles.key) > max(plan.problem.tokens, plan.chunk_rows):
        raise ValueError(f"tiles of {plan.tiles.query:,} by {plan.tiles.key:,} tokens")


def _same(value: Any, other: Any) -> bool:
    """True if two JSON values are equal, fractions up to their last digits."""
    if isinstance(value, float) or isinstance(other, float):
        return isinstance(value, int | float) and isinstance(other, int | float) and math.isclose(value, other, rel_tol=1e-9)
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_same(value[name], other[name]) for name in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    return type(value) is type(other) and bool(value == other)
