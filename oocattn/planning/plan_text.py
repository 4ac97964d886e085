"""A plan in words: what it decided, and what it costs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from oocattn.division.quorums import quorum_size
from oocattn.planning.decoding import describe_decoding, times_decoded
from oocattn.planning.interleaving import describe_interleaving
from oocattn.text import printable
from oocattn.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from oocattn.planning.plan import Plan

WIDTH = 100  # characters of a printed line, of which only a note may have more

COUNTED_LINKS = ("files", "python", "tasks")  # links whose amount is a number; of `compute` it is FLOP, of others bytes


def plan_line(plan: Plan) -> str:
    """A plan in a line."""
    return (
        f"{plan.decomposition} over c = {_chunks(plan)}, {plan.kernel}, {_lanes(plan)}, "
        f"{format_seconds(plan.seconds)} predicted: {plan.problem}"
    )


def plan_text(plan: Plan) -> str:
    """All of a plan, and what it costs, as a table of lines."""
    if plan.decomposition == "cqs":
        division = f"cyclic quorums over c = {_chunks(plan)}, k = {quorum_size(plan.chunks)}"
    else:
        division = f"strips over c = {_chunks(plan)}, {plan.span} key chunk{'s' * (plan.span > 1)} at a time"
    queries = f"queries      {plan.query_chunks} chunk{'s' * (plan.query_chunks > 1)} of {plan.chunk_rows:,} rows"
    lines = [
        *textwrap.wrap(f"problem      {plan.problem}", WIDTH, subsequent_indent=" " * 13),
        *_second_pass(plan),
        f"pairs        {_pairs(plan)}",
        f"division     {division}; {plan.subproblems:,} subproblem{'s' * (plan.subproblems != 1)}",
        *([] if _has_same_chunks(plan) else [queries]),
        f"kernel       {plan.kernel}, {_lanes(plan)}",
        *textwrap.wrap(f"same bits    {plan.pins}", WIDTH, subsequent_indent=" " * 13),
        f"partials     {_partials(plan)}, at most {format_bytes(plan.scratch_disk)} of scratch on disk",
        f"peak memory  host {format_bytes(plan.peak_host)} of {format_bytes(plan.host_memory)}, "
        f"device {format_bytes(plan.peak_device)} of {format_bytes(plan.device_memory)}{_on_each(plan)}",
        *(line for text in _reading(plan) for line in textwrap.wrap(text, WIDTH, subsequent_indent=" " * 13)),
        "",
        f"{'link':<12} {'amount':>12} {'seconds':>9}",
    ]
    for link in plan.links:
        amount = format_bytes(link.amount)
        if link.name in (*COUNTED_LINKS, "compute"):
            amount = f"{format_count(link.amount)}{'FLOP' if link.name == 'compute' else ''}".rstrip()
        mark = "  <- binds" if link.name == plan.binds else ""
        lines.append(f"{link.name:<12} {amount:>12} {_seconds(link.seconds):>9}{mark}")
    lines.append(f"{'predicted':<12} {'':>12} {_seconds(plan.seconds):>9}  ({format_seconds(plan.seconds)})")
    return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in plan.inputs.notes)]))


def _chunks(plan: Plan) -> str:
    """Number and size of chunks; where those of queries are others, only of keys."""
    tokens = "tokens" if _has_same_chunks(plan) else "keys"
    return f"{plan.chunks} chunk{'s' * (plan.chunks > 1)} of {plan.key_chunk_rows:,} {tokens}"


def _second_pass(plan: Plan) -> list[str]:
    """Of a second pass, what it is for."""
    asked = plan.problem.second_pass
    if asked is None:
        return []
    purpose = "proves every row" if asked.reduced is None else f"gives {', '.join(each.name for each in asked.reduced)}"
    return [f"second pass  over the pairs of a result; {purpose}"]


def _has_same_chunks(plan: Plan) -> bool:
    return (plan.query_chunks, plan.chunk_rows) == (plan.chunks, plan.key_chunk_rows)


def _pairs(plan: Plan) -> str:
    """The live pairs, and their share of all."""
    problem = plan.problem
    share = problem.pairs / (problem.rows * problem.keys)
    return f"{format_count(problem.pairs).strip()} of queries and keys, {100 * share:.3g}% of all"


def _partials(plan: Plan) -> str:
    if plan.partials == "disk":
        return "merged in files"
    kept = f"saved every {format_seconds(plan.checkpoint_seconds / 2)}" if plan.saves else "never saved"
    return f"merged in memory, {kept}"


def _reading(plan: Plan) -> list[str]:
    """How often heads are read that lie between each other's, and chunks decoded that lie across the plan's."""
    aligned = plan.inputs.align_rows
    times = 1.0 if plan.held_groups else times_decoded(plan.problem.keys, plan.key_chunk_rows, aligned)
    about = plan.problem, plan.inputs, plan.lanes, plan.held_groups, plan.read_factor, plan.peak_host
    return [describe_interleaving(*about), describe_decoding(times, aligned, plan.key_chunk_rows)]


def _on_each(plan: Plan) -> str:
    return " on each machine" if plan.sharing_lanes < plan.lanes else ""


def _lanes(plan: Plan) -> str:
    shared = f", at most {plan.sharing_lanes} on a machine" if plan.sharing_lanes < plan.lanes else ""
    if plan.device == "cpu":
        more = "; the other workers are left out, for the budget is small" if plan.machine.most_lanes else ""
        return f"{plan.lanes} lane{'s' * (plan.lanes > 1)}{shared}, {plan.threads} threads each{more}"
    gpus = f"{plan.lanes} GPU{'s' * (plan.lanes > 1)}{shared}"
    return f"{gpus}, tiles of {plan.tiles.query:,} queries by {plan.tiles.key:,} keys"


def _seconds(seconds: float) -> str:
    """Seconds in a table, to three digits."""
    return f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:,.0f}"
