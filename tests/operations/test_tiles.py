"""Tiles: every pair of a block is attended exactly once, by calls that a kernel can make."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import GENEROUS, GPU, a_problem

from oocattn.division.base import Block
from oocattn.operations import make_operation
from oocattn.operations.tiles import StagedKeys, join_runs, make_tiles, pieces
from oocattn.pipelines.lane.rehearsal import sample_tiles
from oocattn.planning.candidates import make_plan
from oocattn.planning.memory import Tiles
from oocattn.problem.mask import Causal, Cover, Full


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.data(),
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from([Full, Causal]),
)
def test_every_pair_of_a_block_is_attended_once(
    lengths: list[int], data: st.DataObject, piece: int, size: int, kind: type[Full | Causal]
) -> None:
    """Also where keys are staged in gaps: of some chunks alone."""
    starts = [0, *itertools.accumulate(lengths)]
    mask = kind(starts[-1], starts[-1])
    tokens = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    chunk = data.draw(st.integers(0, len(lengths) - 1))
    others = data.draw(st.sets(st.sampled_from(range(len(lengths)))).map(lambda found: tuple(sorted(found - {chunk}))))
    block = Block(chunk, others, diagonal=data.draw(st.booleans()))
    needed = sorted({*others, *[chunk] * block.diagonal})
    ends = [0, *itertools.accumulate(len(tokens[key]) for key in needed)]
    key_rows = {key: range(*span) for key, span in zip(needed, itertools.pairwise(ends), strict=True)}
    staged = [token for key in needed for token in tokens[key]]
    attended = np.zeros((starts[-1], starts[-1]), int)
    for rows in pieces(range(len(tokens[chunk])), piece):
        for tile in make_tiles(mask, tokens.__getitem__, block, key_rows, rows, size):
            keys = [token for run in tile.key_tokens for token in run]
            assert 0 < len(keys) <= size
            assert keys == [staged[row] for row in tile.keys]
            assert [*tile.row_tokens] == [tokens[chunk].start + rows.start + row for row in tile.rows]
            added = np.ones((len(tile.rows), len(keys)), int)
            if (intervals := tile.intervals()) is not None:
                assert len(tile.key_tokens) == 1
                a, b, c, d = intervals.values()[:, :, None].transpose(1, 0, 2)
                key = np.arange(len(keys))
                added = ((a <= key) & (key < b)) | ((c <= key) & (key < d))
            assert added.sum() == tile.pairs > 0
            attended[np.ix_(tile.row_tokens, keys)] += added
    expected = np.zeros_like(attended)
    for key in needed:
        for row in tokens[chunk]:
            for run in mask.key_ranges(row):
                expected[row, max(run.start, tokens[key].start) : min(run.stop, tokens[key].stop)] = 1
    np.testing.assert_array_equal(attended, expected)


def keys_at_a_time(rows: int, tiles: Tiles) -> list[list[range]]:
    """The runs of keys that each row of a causal chunk attends, a run in one kernel call: this decides its bits."""
    seen: list[list[range]] = [[] for _ in range(rows)]
    for piece in pieces(range(rows), tiles.query):
        block = Block(0, (), diagonal=True)
        for tile in make_tiles(Causal(rows, rows), lambda _: range(rows), block, {0: range(rows)}, piece, tiles.key):
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
    assert (usual.digest == other.digest) <= (keys_at_a_time(4000, usual.tiles) == keys_at_a_time(4000, other.tiles))


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_runs_join_what_is_staged_side_by_side_and_drop_what_is_empty(lengths: list[int], gaps: list[int]) -> None:
    staged, at = [], 0
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=False)):
        at += gap
        staged.append(StagedKeys(range(at, at + length), (range(100 * number, 100 * number + length),)))
        at += length
    runs = join_runs(staged)
    assert [row for run in runs for row in run.rows] == [row for run in staged for row in run.rows]
    assert [token for run in runs for tokens in run.tokens for token in tokens] == [
        token for run in staged for tokens in run.tokens for token in tokens
    ]
    assert all(run.rows for run in runs)
    assert all(before.rows.stop < after.rows.start for before, after in itertools.pairwise(runs))


@pytest.mark.parametrize(("chunks", "decomposition"), [(1, "cqs"), (7, "cqs"), (8, "cqs"), (8, "strips")])
@pytest.mark.parametrize("causal", [True, False])
def test_the_shapes_of_a_plan_are_few_and_within_its_tiles(chunks: int, decomposition: str, causal: bool) -> None:
    problem = a_problem(tokens=300_000, query_heads=2, kv_heads=1, dtype="float16", causal=causal)
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS}
    plan = make_plan(problem, GPU, chunks=chunks, decomposition=decomposition, **options)
    shapes = sample_tiles(plan, make_operation(plan))
    assert max(shape.piece_rows for shape in shapes) == plan.tiles.query
    assert max(shape.keys for shape in shapes) == plan.tiles.key
    assert any(shape.cover is Cover.PARTIAL for shape in shapes) == causal
    assert all(0 < shape.rows <= shape.piece_rows and shape.keys > 0 for shape in shapes)
    assert all((shape.rows, shape.keys) == (len(tile.rows), len(tile.keys)) for shape, tile in shapes.items())
    assert len(shapes) <= 24
