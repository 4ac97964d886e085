"""Sums over rows: those of all blocks of a run are added up, in a fixed order, and written beside `out` and `lse`.

It takes minutes of a large run, and may be cut off anywhere: chunks that are written stay. Each block is read once, unless
its head group's sums are more than can be held.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from oocattn.cores import count_cores
from oocattn.errors import IntegrityError, ProblemError
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Float64s, KeyReduction
from oocattn.operations.staging import stage_rows
from oocattn.operations.survey import key_runs
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.run import Run
from oocattn.planning.plan import Plan
from oocattn.problem.bounds import join_ranges
from oocattn.storage.files import folders
from oocattn.storage.layout import chunk_bytes
from oocattn.storage.make.create import OwnStore, create_array, out_dimensions, sync_metadata, write_chunk
from oocattn.storage.metadata import open_array
from oocattn.storage.results.arrays import ChunkFiles
from oocattn.threads import ThreadPool, map_in_order
from oocattn.units import ceil_div

MOST_IN_CHUNKS = 1 << 18
"""Elements of the chunks of an array that are written together, over all heads of a group."""

MOST_THREADS = 8
"""That add up at a time: each reads about 1 GB/s, as it computes checksums."""

THREAD_BYTES = 16 << 20
"""Of sums for which there is one thread: less is added up before others have begun."""

_HELD_BYTES = 12
"""Of an element of sums, and of the same as it is written."""


@dataclass(frozen=True)
class _Part:
    """A part of the sums of a reduction, for all heads of a group: `shape` [g, span, ...], and the chunk of each head."""

    name: str
    span: range
    shape: tuple[int, ...]
    chunks: list[tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes that are held of it."""
        return _HELD_BYTES * math.prod(self.shape)


def write_sums(run: Run, check: Callable[[], object]) -> None:
    """Write the arrays of sums over rows of a run whose chunks are all finished, into its growing result.

    It takes no more memory than the lanes of the run did, which are closed, unless a block and one part are more. `check` is
    called before each block is read, from any thread; what it raises ends this, and the next call goes on with the chunks
    that are missing. Raises IntegrityError where the sums of a block are not whole; their file is removed, and the block
    computed again where the run is resumed.
    """
    reductions = _along_rows(run.plan)
    if not reductions:
        return
    arrays = {name: _open_array(run, name, reduction) for name, reduction in reductions.items()}
    room, of_block = _room(run.plan), _most_of_block(run.plan, reductions)
    missing = (_missing(run.plan, arrays, head_group) for head_group in range(run.plan.problem.head_groups))
    calls = [(number, held) for number, parts in enumerate(missing) for held in _together(parts, room - of_block)]
    taken = [sum(part.nbytes for part in held) for _, held in calls]
    of_call = of_block + max(taken, default=0)
    threads = max(1, min(MOST_THREADS, count_cores(), ceil_div(sum(taken), THREAD_BYTES), room // of_call))

    def write(head_group: int, parts: Sequence[_Part]) -> None:
        for part, sums in zip(parts, _add_up(run, reductions, head_group, parts, check), strict=True):
            for coordinates, of_head in zip(part.chunks, sums.astype(np.float32), strict=True):
                write_chunk(arrays[part.name], coordinates, of_head[np.newaxis, np.newaxis])

    with ThreadPool(threads, "oocattn-sum") as pool:
        for _ in map_in_order(pool, write, calls, threads):
            pass
    sync_metadata(run.growing.path)


def _room(plan: Plan) -> int:
    """Bytes of memory that may be held: those of the lanes."""
    return plan.peak_host


def _most_of_block(plan: Plan, reductions: Mapping[str, KeyReduction]) -> int:
    """Bytes of the sums of a block, at most."""
    rows, keys = plan.query_rows(0), [range(plan.problem.keys)]
    shapes = (each.shapes(plan.problem.group_size, rows, keys) for each in reductions.values())
    return 8 * sum(math.prod(shape) for of_reduction in shapes for shape in of_reduction)


def _open_array(run: Run, name: str, reduction: KeyReduction) -> zarr.Array[Any]:
    """The array of a reduction as an earlier call has left it, or a new one."""
    problem, growing, found = run.plan.problem, run.growing.path, None
    count, *unit = reduction.shape(problem.out_rows, problem.keys)
    rows = min(count, max(1, MOST_IN_CHUNKS // (math.prod(unit) * problem.group_size)))
    shape, chunks = (problem.batch, problem.out_heads, count, *unit), (1, 1, rows, *unit)
    with suppress(IntegrityError, ProblemError):
        found = open_array(OwnStore(growing), name, str(growing))
    if found is not None and (found.shape, found.chunks, found.dtype) == (shape, chunks, np.dtype(np.float32)):
        return found
    folders.remove_ours(growing / name, folders.GROUP)
    dimensions = *out_dimensions(problem)[:2], *reduction.dimensions
    group = zarr.open_group(OwnStore(growing), mode="r+")
    return create_array(group, name, shape, "float32", rows, dimensions)


def _missing(plan: Plan, arrays: Mapping[str, zarr.Array[Any]], head_group: int) -> Iterator[_Part]:
    """The parts of the sums of a head group of which chunks are missing."""
    group, files = plan.problem.head_group(head_group), ChunkFiles()
    for name, array in arrays.items():
        count, *unit = array.shape[2:]
        for number, start in enumerate(range(0, count, array.chunks[2])):
            chunks = [(group.batch, head, number, *(0 for _ in unit)) for head in group.outputs]
            if any(files.size(array, coordinates) != chunk_bytes(array) for coordinates in chunks):
                span = range(start, min(count, start + array.chunks[2]))
                yield _Part(name, span, (len(chunks), len(span), *unit), chunks)


def _together(parts: Iterable[_Part], room: int) -> Iterator[list[_Part]]:
    """Put parts together that are held at a time: as many as `room` bytes take, or one."""
    held: list[_Part] = []
    for part in parts:
        if held and sum(each.nbytes for each in (*held, part)) > room:
            yield held
            held = []
        held.append(part)
    if held:
        yield held


def _add_up(
    run: Run,
    reductions: Mapping[str, KeyReduction],
    head_group: int,
    parts: Sequence[_Part],
    check: Callable[[], object],
) -> list[Float64s]:
    """Parts of the sums of all blocks of a head group: [g, span, ...] of each."""
    into, memory = [np.zeros(part.shape) for part in parts], np.empty(0)
    files = PartialFiles(run.paths.scratch, run.journal.run, run.journal.claim)
    heads = len(run.plan.problem.head_group(head_group).query_heads)
    for partial, tokens, keys in _blocks(run.plan, head_group):
        met = [reductions[part.name].meets(part.span, tokens, keys) for part in parts]
        check()
        if not any(met):
            continue
        shapes = {name: each.shapes(heads, tokens, keys) for name, each in reductions.items()}
        if memory.size < (size := sum(math.prod(shape) for of_reduction in shapes.values() for shape in of_reduction)):
            memory = np.empty(size)
        sums = _cut(memory, shapes)
        files.read_sums(partial, [array for of_reduction in sums.values() for array in of_reduction])
        for part, total in itertools.compress(zip(parts, into, strict=True), met):
            reductions[part.name].place(total, part.span, sums[part.name], tokens, keys)
    return into


def _cut(memory: Float64s, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, list[Float64s]]:
    """Arrays of these shapes in memory, one after another."""
    found, first = dict[str, list[Float64s]](), 0
    for name, of_reduction in shapes.items():
        found[name] = []
        for shape in of_reduction:
            found[name].append(memory[first : (first := first + math.prod(shape))].reshape(shape))
    return found


def _blocks(plan: Plan, head_group: int) -> Iterator[tuple[PartialId, range, list[range]]]:
    """The blocks of a head group: the partial of each, its rows, and its keys as ascending runs that do not touch."""
    division = plan.division_of(head_group)
    for index in division.indices:
        subproblem = division.subproblem(index)
        keys = join_ranges(key_runs(stage_rows(plan, head_group, subproblem)))
        for block in subproblem.blocks:
            yield PartialId(head_group, block.query_chunk, (index,)), plan.query_rows(block.query_chunk), keys


def _along_rows(plan: Plan) -> dict[str, KeyReduction]:
    """The reductions along rows by name, in the order in which their sums are kept."""
    asked = plan.problem.second_pass
    found = {each.name: reductions_of([each])[1] for each in (asked and asked.reduced) or ()}
    return {name: along_rows[0] for name, along_rows in found.items() if along_rows}
