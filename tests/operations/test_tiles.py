"""Tiles on a GPU: every pair of a block is attended exactly once, by calls that a kernel can make."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oocattn.pipelines.lane.tiles import call_shapes, contiguous_runs, key_tiles, pieces
from support import GENEROUS, GPU, a_problem

from oocattn.division.base import Block
from oocattn.planning.candidates import make_plan
from oocattn.planning.memory import Tiles


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5), st.data(), st.integers(1, 50), st.integers(1, 50), st.booleans()
)
def test_every_pair_of_a_block_is_attended_once(
    lengths: list[int], data: st.DataObject, query_tile: int, key_tile: int, causal: bool
) -> None:
    starts = [0, *itertools.accumulate(lengths)]
    key_rows = {chunk: range(starts[chunk], starts[chunk + 1]) for chunk in range(len(lengths))}
    chunk = data.draw(st.integers(0, len(lengths) - 1))
    others = data.draw(st.sets(st.sampled_from(range(len(lengths)))).map(lambda found: tuple(sorted(found - {chunk}))))
    block = Block(chunk, others, diagonal=data.draw(st.booleans()))
    own = key_rows[chunk]
    attended = np.zeros((len(own), starts[-1]), int)
    for rows in pieces(range(len(own)), query_tile):
        for tile in key_tiles(block, key_rows, rows, key_tile, causal):
            assert 0 < len(tile.keys) <= key_tile
            before = attended.sum()
            for call in tile.calls:
                mask = np.ones((len(call.rows), len(tile.keys)), int)
                if call.diagonal:
                    assert len(call.rows) == len(tile.keys)
                    mask = np.tril(mask)
                first = rows.start + call.rows.start
                attended[first : first + len(call.rows), tile.keys.start : tile.keys.stop] += mask
            assert attended.sum() - before == tile.pairs
    expected = np.zeros_like(attended)
    for other in others:
        expected[:, key_rows[other].start : key_rows[other].stop] = 1
    if block.diagonal:
        triangle = np.ones((len(own), len(own)), int)
        expected[:, own.start : own.stop] = np.tril(triangle) if causal else triangle
    np.testing.assert_array_equal(attended, expected)


def keys_at_a_time(rows: int, tiles: Tiles) -> list[list[range]]:
    """The runs of keys that each row of a causal chunk attends, a run in one kernel call: this decides its bits."""
    seen: list[list[range]] = [[] for _ in range(rows)]
    for tile in pieces(range(rows), tiles.query):
        for keys in key_tiles(Block(0, (), diagonal=True), {0: range(rows)}, tile, tiles.key, causal=True):
            for row in itertools.chain(*(call.rows for call in keys.calls)):
                seen[tile.start + row].append(keys.keys)
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
def test_runs_join_what_touches_and_drop_what_is_empty(lengths: list[int], gaps: list[int]) -> None:
    ranges, at = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        at += gap
        ranges.append(range(at, at + length))
        at += length
    runs = contiguous_runs(ranges)
    assert [row for run in runs for row in run] == [row for rows in ranges for row in rows]
    assert all(runs)
    assert all(before.stop < after.start for before, after in itertools.pairwise(runs))


@pytest.mark.parametrize(("chunks", "decomposition"), [(1, "cqs"), (7, "cqs"), (8, "cqs"), (8, "strips")])
@pytest.mark.parametrize("causal", [True, False])
def test_the_shapes_of_a_plan_are_those_of_its_calls(chunks: int, decomposition: str, causal: bool) -> None:
    problem = a_problem(tokens=300_000, query_heads=2, kv_heads=1, dtype="float16", causal=causal)
    options = {"device_memory": GENEROUS, "host_memory": GENEROUS}
    plan = make_plan(problem, GPU, chunks=chunks, decomposition=decomposition, **options)
    shapes = call_shapes(plan)
    assert max(shape.tile_rows for shape in shapes) == plan.tiles.query
    assert max(shape.keys for shape in shapes) == plan.tiles.key
    assert any(shape.diagonal for shape in shapes) == causal
    assert all(shape.rows == shape.keys for shape in shapes if shape.diagonal)
    assert all(0 < shape.rows <= shape.tile_rows and shape.keys > 0 for shape in shapes)
    assert len(shapes) <= 24
