"""Plans read from files: their numbers must be those that the planner computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from oocattn.planning.options import MAX_CHUNKS, MAX_SUBPROBLEMS
from oocattn.planning.plan import Plan
from oocattn.planning.recosting import recost
from oocattn.problem.calls import ScratchBytes
from oocattn.problem.given import GivenArrays
from oocattn.problem.problem import with_given
from oocattn.records import from_json, to_json
from oocattn.units import ceil_div

Digests = Mapping[str, str]  # of arrays, by name


def read_plan(
    content: object, scratch_of: Callable[[str, str], ScratchBytes] | None, read_given: Callable[[Digests], GivenArrays]
) -> Plan:
    """Read and check the plan that `to_json` wrote; ValueError for what no plan would be.

    `read_given` gives the arrays with the digests that its problem names.
    `scratch_of(kernel, device)` bounds a kernel's allocation; without it the numbers that follow from that are believed.
    """
    plan = from_json(Plan, content)
    plan = replace(plan, problem=with_given(plan.problem, read_given(plan.problem.digests)))
    _check_choices(plan)
    recosted = plan if scratch_of is None else recost(plan, scratch_of(plan.kernel, plan.device))
    found, expected = to_json(plan), to_json(recosted)
    for name, value in expected.items():
        if not _same(value, found[name]):
            raise ValueError(f"its {name.replace('_', ' ')} does not follow from the rest of the plan")
    if not plan.fits:
        raise ValueError("its peak memory is beyond its budgets")
    return plan


def _check_choices(plan: Plan) -> None:
    """Raise ValueError where no plan would have been chosen so."""
    longest = max(plan.problem.out_rows, plan.problem.keys)
    limit = min(longest, MAX_CHUNKS)
    strips = plan.decomposition == "strips"
    if max(plan.query_chunks, plan.chunks) > limit:
        raise ValueError(f"{plan.query_chunks:,} and {plan.chunks:,} chunks: expected {limit:,} at most")
    if not strips and plan.query_chunks != plan.chunks:
        raise ValueError(f"{plan.query_chunks:,} query chunks and {plan.chunks:,} key chunks: expected as many of both")
    if plan.span > plan.chunks or strips != (plan.span > 0):
        raise ValueError(f"strips of {plan.span:,} of {plan.chunks:,} chunks")
    subproblems = plan.query_chunks * ceil_div(plan.chunks, plan.span) if strips else plan.chunks
    if subproblems > MAX_SUBPROBLEMS:
        raise ValueError(f"{subproblems:,} subproblems of a head group: expected {MAX_SUBPROBLEMS:,} at most")
    if plan.accumulators > 3 * plan.query_chunks + 4:
        raise ValueError(f"{plan.accumulators:,} accumulators, partials in {plan.partials}")
    if max(plan.tiles.query, plan.tiles.key) > max(longest, plan.chunk_rows, plan.key_chunk_rows):
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
