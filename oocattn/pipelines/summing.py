"""Sums over rows: those of all blocks of a run are added up, in a fixed order, and written beside `out` and `lse`.

It takes minutes of a large run, and may be cut off anywhere: chunks that are written stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import zarr

from oocattn.errors import IntegrityError, ProblemError
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Float64s, Int64s, KeyReduction
from oocattn.operations.staging import stage_rows
from oocattn.operations.survey import key_tokens
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.run import Run
from oocattn.planning.plan import Plan
from oocattn.storage.files import folders
from oocattn.storage.layout import chunk_bytes
from oocattn.storage.make.create import OwnStore, create_array, out_dimensions, sync_metadata, write_chunk
from oocattn.storage.metadata import open_array
from oocattn.storage.results.arrays import ChunkFiles
from oocattn.units import ceil_div

MOST_HELD = 1 << 18
"""Elements of sums that are held at a time, over all heads of a group, besides those of a block: 2 MiB."""


def write_sums(run: Run, check: Callable[[], object]) -> None:
    """Write the arrays of sums over rows of a run whose chunks are all finished, into its growing result.

    `check` is called before each block is read; what it raises ends this, and the next call goes on with the chunks that are
    missing. Raises IntegrityError where the sums of a block are not whole; their file is removed, and the block computed
    again where the run is resumed.
    """
    for name in _along_rows(run.plan):
        _write_array(run, name, check)


def _write_array(run: Run, name: str, check: Callable[[], object]) -> None:
    """Write what is missing of the array of a reduction."""
    problem = run.plan.problem
    count, *unit = _along_rows(run.plan)[name].shape(problem.out_rows, problem.keys)
    at_a_time = max(1, MOST_HELD // (math.prod(unit) * problem.group_size))
    array = _open_array(run, name, (problem.batch, problem.out_heads, count, *unit), min(count, at_a_time))
    files = ChunkFiles()
    for head_group in range(problem.head_groups):
        for number in range(ceil_div(count, at_a_time)):
            chunks = _chunks(run.plan, array, head_group, number)
            if all(files.size(array, coordinates) == chunk_bytes(array) for coordinates in chunks):
                continue
            span = range(number * at_a_time, min(count, (number + 1) * at_a_time))
            sums = _add_up(run, name, head_group, span, unit, check).astype(np.float32)
            for coordinates, of_head in zip(chunks, sums, strict=True):
                write_chunk(array, coordinates, of_head[np.newaxis, np.newaxis])
    sync_metadata(run.growing.path)


def _open_array(run: Run, name: str, shape: tuple[int, ...], chunk_rows: int) -> zarr.Array[Any]:
    """The array of a reduction as an earlier call has left it, or a new one."""
    growing, found = run.growing.path, None
    with suppress(IntegrityError, ProblemError):
        found = open_array(OwnStore(growing), name, str(growing))
    chunks = 1, 1, chunk_rows, *shape[3:]
    if found is not None and (found.shape, found.chunks, found.dtype) == (shape, chunks, np.dtype(np.float32)):
        return found
    folders.remove_ours(growing / name, folders.GROUP)
    problem, reduction = run.plan.problem, _along_rows(run.plan)[name]
    dimensions = *out_dimensions(problem)[:2], *reduction.dimensions
    group = zarr.open_group(OwnStore(growing), mode="r+")
    return create_array(group, name, shape, "float32", chunk_rows, dimensions)


def _chunks(plan: Plan, array: zarr.Array[Any], head_group: int, number: int) -> list[tuple[int, ...]]:
    """The chunks of the heads of a group, each as its coordinates, that have one part of the sums."""
    group = plan.problem.head_group(head_group)
    return [(group.batch, head, number, *(0 for _ in array.shape[3:])) for head in group.outputs]


def _add_up(run: Run, name: str, head_group: int, span: range, unit: Sequence[int], check: Callable[[], object]) -> Float64s:
    """A part of the sums of all blocks of a head group: [g, span, ...]."""
    heads = len(run.plan.problem.head_group(head_group).query_heads)
    into = np.zeros((heads, len(span), *unit))
    files = PartialFiles(run.paths.scratch, run.journal.run, run.journal.claim)
    reductions = _along_rows(run.plan)
    for partial, tokens, keys in _blocks(run.plan, head_group):
        check()
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
