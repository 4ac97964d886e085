"""Sums over rows: those of all blocks of a run are added up, in a fixed order, and written beside `out` and `lse`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr

from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Float64s, Int64s, KeyReduction
from oocattn.operations.staging import stage_rows
from oocattn.operations.survey import key_tokens
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.run import Run
from oocattn.planning.plan import Plan
from oocattn.storage.files import folders
from oocattn.storage.make.create import OwnStore, create_array, out_dimensions, sync_metadata, write_chunk
from oocattn.units import ceil_div

MOST_HELD = 1 << 18
"""Elements of sums that are held at a time, over all heads of a group, besides those of a block: 2 MiB."""


def write_sums(run: Run) -> None:
    """Write the arrays of sums over rows of a run whose chunks are all finished, into its growing result.

    Raises IntegrityError where the sums of a block are not whole; their file is removed, and the block computed again where
    the run is resumed.
    """
    for name in _along_rows(run.plan):
        _write_array(run, name)


def _write_array(run: Run, name: str) -> None:
    """Write the array of a reduction."""
    problem, growing = run.plan.problem, run.growing.path
    reduction = _along_rows(run.plan)[name]
    count, *unit = reduction.shape(problem.out_rows, problem.keys)
    at_a_time = max(1, MOST_HELD // (math.prod(unit) * problem.group_size))
    folders.remove_ours(growing / name, folders.GROUP)  # of a run that was killed here
    group = zarr.open_group(OwnStore(growing), mode="r+")
    shape = (problem.batch, problem.out_heads, count, *unit)
    dimensions = *out_dimensions(problem)[:2], *reduction.dimensions
    array = create_array(group, name, shape, "float32", min(count, at_a_time), dimensions)
    for head_group in range(problem.head_groups):
        for number in range(ceil_div(count, at_a_time)):
            span = range(number * at_a_time, min(count, (number + 1) * at_a_time))
            _write_span(run, array, head_group, number, _add_up(run, name, head_group, span, unit))
    sync_metadata(growing)


def _add_up(run: Run, name: str, head_group: int, span: range, unit: Sequence[int]) -> Float64s:
    """A part of the sums of all blocks of a head group: [g, span, ...]."""
    heads = len(run.plan.problem.head_group(head_group).query_heads)
    into = np.zeros((heads, len(span), *unit))
    files = PartialFiles(run.paths.scratch, run.journal.run, run.journal.claim)
    reductions = _along_rows(run.plan)
    for partial, tokens, keys in _blocks(run.plan, head_group):
        if not reductions[name].meets(span, tokens, keys):
            continue
        begun = {each: made.begin(heads, tokens, keys) for each, made in reductions.items()}
        files.read_sums(partial, [array for sums in begun.values() for array in sums.arrays])
        reductions[name].place(into, span, begun[name].arrays, tokens, keys)
    return into


def _blocks(plan: Plan, head_group: int) -> Iterator[tuple[PartialId, range, Int64s]]:
    """The blocks of a head group: the partial of each, its rows, and its keys."""
    division = plan.division_of(head_group)
    for index in division.indices:
        subproblem = division.subproblem(index)
        keys = key_tokens(stage_rows(plan, head_group, subproblem))
        for block in subproblem.blocks:
            yield PartialId(head_group, block.query_chunk, (index,)), plan.query_rows(block.query_chunk), keys


def _along_rows(plan: Plan) -> dict[str, KeyReduction]:
    """The reductions along rows by name, in the order in which their sums are kept."""
    asked = plan.problem.second_pass
    found = {each.name: reductions_of([each])[1] for each in (asked and asked.reduced) or ()}
    return {name: along_rows[0] for name, along_rows in found.items() if along_rows}


def _write_span(run: Run, array: zarr.Array[Any], head_group: int, number: int, sums: Float64s) -> None:
    """Write a part of the sums of a head group, head by head."""
    group = run.plan.problem.head_group(head_group)
    for of_head, head in zip(sums.astype(np.float32), group.outputs, strict=True):
        coordinates = (group.batch, head, number, *(0 for _ in sums.shape[2:]))
        write_chunk(array, coordinates, of_head[np.newaxis, np.newaxis])
