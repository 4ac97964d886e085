"""Tiles: every pair of a block is attended exactly once, by calls that a kernel can make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_plans import KINDS, plans
from numpy.typing import NDArray
from support import GENEROUS, GPU, MACHINE, a_problem

from oocattn import Plan
from oocattn.division.base import Block, Subproblem
from oocattn.operations import make_operation
from oocattn.operations.staging import StagedRows, stage_rows
from oocattn.operations.tiles import Tile, make_tiles, pieces
from oocattn.pipelines.lane.rehearsal import sample_tiles
from oocattn.planning.candidates import make_plan
from oocattn.planning.memory import Tiles
from oocattn.problem.given import GivenArrays
from oocattn.problem.mask import Cover, Mask


def check_tile(tile: Tile, rows: range, size: int, staged_keys: list[int], matrix: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What every tile of some rows must be; return its pairs, [rows, keys], as kernels get them."""
    keys = [token for run in tile.key_tokens for token in run]
    assert 0 < len(keys) <= size
    assert keys == [staged_keys[place] for place in tile.keys]
    assert [*tile.row_tokens] == [rows.start + row for row in tile.rows]
    assert tile.row_tokens.stop <= rows.stop
    pairs = matrix[np.ix_(tile.row_tokens, keys)]
    assert tile.cover is (Cover.FULL if pairs.all() else Cover.PARTIAL)
    assert pairs[0].any()  # no rows that attend nothing at either end
    assert pairs[-1].any()
    assert tile.pairs == pairs.sum()
    added = np.ones(pairs.shape, bool)
    intervals = tile.intervals()
    assert (intervals is None) == (tile.cover is Cover.FULL)
    if intervals is not None:
        a, b, c, d = np.asarray(intervals.values())[:, :, None].transpose(1, 0, 2)
        key = np.arange(len(keys))
        added = ((a <= key) & (key < b)) | ((c <= key) & (key < d))
    np.testing.assert_array_equal(added, pairs)
    return added


def check_positions(tile: Tile) -> None:
    """The distance of a key that a row attends follows from its place in the tile."""
    intervals = tile.intervals(always=True)
    assert intervals is not None
    keys = [token for run in tile.key_tokens for token in run]
    for row, position, (a, b, c, d) in zip(tile.row_tokens, intervals.positions(), intervals.values(), strict=True):
        expected = tile.mask.bounds(range(row, row + 1)).positions()[0]
        for place in (*range(a, b), *range(c, d)):
            assert position - place == expected - keys[place]


def check_tiles(
    plan: Plan, matrix: NDArray[np.bool_], head_group: int, part: Subproblem, piece: int, size: int, join: bool
) -> None:
    """Each pair of a subproblem is in one tile, and no others are."""
    mask, staged = plan.mask(head_group), stage_rows(plan, head_group, part)
    staged_keys = [token for runs in staged.keys.values() for run in runs for token in run.rows]
    expected, attended = np.zeros(matrix.shape, int), np.zeros(matrix.shape, int)
    for block in part.blocks:
        queries = plan.query_rows(block.query_chunk)
        for rows in pieces(queries, piece):
            for tile in make_tiles(mask, queries, plan.key_rows, block, staged, rows, size, join=join):
                if not join:
                    check_positions(tile)
                added = check_tile(tile, rows, size, staged_keys, matrix)
                attended[np.ix_(tile.row_tokens, [token for run in tile.key_tokens for token in run])] += added
        for key in block.key_chunks:
            keys = plan.key_rows(key)
            expected[queries.start : queries.stop, keys.start : keys.stop] = 1
    np.testing.assert_array_equal(attended, expected * matrix)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), piece=st.integers(1, 50), size=st.integers(1, 50), join=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_pair_of_a_subproblem_is_attended_once(
    kind: str, data: st.DataObject, piece: int, size: int, join: bool
) -> None:
    """In tiles of runs of keys as they are staged, whatever the pieces and tiles."""
    plan, matrix = data.draw(plans(most=60, kinds=(kind,)))
    for head_group in range(plan.problem.head_groups):
        division = plan.division_of(head_group)
        for index in division.indices:
            check_tiles(plan, matrix[head_group], head_group, division.subproblem(index), piece, size, join=join)


@given(plans(most=60), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_tiles_of_an_operation_keep_distances_where_heads_have_slopes(
    made: tuple[Plan, NDArray[np.bool_]], size: int
) -> None:
    """For ALiBi takes the distance of a key from its place in the tile."""
    plan, matrix = made
    slopes = np.array([0.5, 0.25], np.float32)
    plan = replace(plan, problem=replace(plan.problem, given=replace(plan.problem.given, alibi_slopes=slopes)))
    operation, division = make_operation(plan), plan.division_of(1)
    for index in division.indices:
        part = division.subproblem(index)
        staged = stage_rows(plan, 1, part)
        for block in part.blocks:
            tiles = [*operation.tiles(1, block, staged, plan.query_rows(block.query_chunk), size)]
            for tile in tiles:
                check_positions(tile)
            assert sum(tile.pairs for tile in tiles) == sum(
                matrix[1][row, plan.key_rows(key).start : plan.key_rows(key).stop].sum()
                for row in plan.query_rows(block.query_chunk)
                for key in block.key_chunks
            )


MANY = 300

APART: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "documents without queries": (0, 4, 0, {}),
    "windows at the ends of longer keys": (3, 9, 9, {"causal": True, "window_size": (2, 0)}),
    "windows and the first keys": (1, 9, 9, {"causal": True, "window_size": (2, 0), "sink_tokens": 1}),
}
"""Queries of every second document, keys of it and of the others, which have 2 queries, and the rest of the mask."""


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("name", APART)
def test_keys_that_lie_apart_are_a_few_kernel_calls(name: str, slopes: bool) -> None:
    """Of many documents, with live keys that others lie between."""
    queries, keys, others, asked = APART[name]
    lengths = np.tile([queries, 2], MANY), np.tile([keys, others or keys], MANY)
    given = {part: np.cumsum([0, *numbers]) for part, numbers in zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True)}
    if slopes:
        given["alibi_slopes"] = np.array([0.5], np.float32)
    arrays = GivenArrays(**given)
    total = (int(numbers.sum()) for numbers in lengths)
    problem = a_problem(next(total), keys=next(total), given=arrays, digests=arrays.digests, **{"causal": False, **asked})
    plan = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1)
    part = plan.division_of(0).subproblem(0)
    staged = stage_rows(plan, 0, part)
    tiles = [*make_operation(plan).tiles(0, part.blocks[0], staged, plan.query_rows(0), staged.key_total)]
    within_documents = slopes and "sink_tokens" in asked  # whose keys lie apart, so that distances do not follow
    assert len(tiles) == (2 * MANY + 1 if within_documents else 1)
    assert sum(tile.pairs for tile in tiles) == problem.pairs
    assert sum(len(tile.keys) for tile in tiles) == staged.key_total < problem.keys


def test_head_groups_of_one_mask_share_their_tiles_and_those_of_others_do_not() -> None:
    given = GivenArrays(seqused_k=np.array([50, 30, 50], np.int32))
    problem = a_problem(64, batch=3, query_heads=2, kv_heads=2, given=given)
    plan = make_plan(problem, GPU, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1)
    operation, staged, found = make_operation(plan), {}, []
    for group in range(6):
        mask, part = plan.mask(group), plan.division_of(group).subproblem(0)
        rows = staged.setdefault(mask, stage_rows(plan, group, part))
        found.append([*operation.tiles(group, part.blocks[0], rows, plan.query_rows(0), 20)])
        assert sum(tile.pairs for tile in found[-1]) == mask.pairs()
    for first, tiles in enumerate(found):
        shared = [
            all(tile is other for tile, other in zip(tiles, others, strict=len(tiles) == len(others))) for others in found
        ]
        assert shared == [plan.mask(group) is plan.mask(first) for group in range(6)]


def keys_at_a_time(rows: int, tiles: Tiles, mask: Mask) -> list[list[range]]:
    """The runs of keys that each row of a chunk attends, a run in one kernel call: this decides its bits."""
    seen: list[list[range]] = [[] for _ in range(rows)]
    plan = make_plan(a_problem(rows), GPU, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1)
    everything = range(rows)
    staged: StagedRows = stage_rows(plan, 0, plan.division_of(0).subproblem(0))
    for piece in pieces(everything, tiles.query):
        for tile in make_tiles(mask, everything, lambda _: everything, Block(0, (0,)), staged, piece, tiles.key, join=True):
            for row in tile.row_tokens:
                seen[row].append(tile.keys)
    return seen


@pytest.mark.parametrize(
    "query",
    [
        4000, 2000, 1000,
        500,
    ],
)  # fmt: skip
def test_plans_of_one_digest_attend_the_same_keys_at_a_time(query: int) -> None:
    """Whatever the query tiles, for they follow from the device's budget."""
    made = make_plan(a_problem(4000), GPU, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1)
    usual, other = (replace(made, tiles=Tiles(rows, 1000)) for rows in (4000, query))
    mask = Mask.of(4000, 4000, causal=True)
    same = keys_at_a_time(4000, usual.tiles, mask) == keys_at_a_time(4000, other.tiles, mask)
    assert (usual.digest == other.digest) <= same


@pytest.mark.parametrize(("chunks", "decomposition"), [(1, "cqs"), (7, "cqs"), (8, "cqs"), (8, "strips")])
@pytest.mark.parametrize("causal", [True, False])
def test_the_shapes_of_a_plan_are_few_and_within_its_tiles(chunks: int, decomposition: str, causal: bool) -> None:
    problem = a_problem(300_000, query_heads=2, kv_heads=1, dtype="float16", causal=causal)
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS}
    plan = make_plan(problem, GPU, chunks=chunks, decomposition=decomposition, **options)
    shapes = sample_tiles(plan, make_operation(plan))
    assert max(shape.piece_rows for shape in shapes) == plan.tiles.query
    assert max(shape.keys for shape in shapes) == plan.tiles.key
    assert any(shape.cover is Cover.PARTIAL for shape in shapes) == causal
    assert all(0 < shape.rows <= shape.piece_rows and shape.keys > 0 for shape in shapes)
    assert all((shape.rows, shape.keys) == (len(tile.rows), len(tile.keys)) for shape, tile in shapes.items())
    assert len(shapes) <= 24
