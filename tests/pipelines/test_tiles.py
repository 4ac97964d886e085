"""Tiles on a GPU: every pair of a block is attended exactly once, by calls that a kernel can make."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oocattn.pipelines.tiles import contiguous_runs, key_tiles, pieces
from oocattn.quorum import Block


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
