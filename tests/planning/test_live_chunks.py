"""Live chunk pairs and the keys that rows need, as a dense mask has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import mask_by_definition

from oocattn.division.quorums import CyclicQuorums
from oocattn.planning.decoding import times_keys_decoded
from oocattn.planning.live import MOST_PRUNED, ChunkGrid, keys_needed, keys_of_quorums, live_pairs, row_edges
from oocattn.problem.mask import Mask
from oocattn.units import ceil_div


@st.composite
def masks(draw: st.DrawFn, most: int = 60) -> tuple[Mask, NDArray[np.bool_]]:
    """A mask of anything that may be asked, and the same as a dense matrix [rows, keys]."""
    queries, keys = draw(st.integers(1, most)), draw(st.integers(1, most))
    keys = draw(st.sampled_from([queries, keys]))
    side = st.one_of(st.none(), st.integers(0, most))
    causal, window = draw(st.booleans()), draw(st.one_of(st.just((None, None)), st.tuples(side, side)))
    window = window[0], None if causal else window[1]
    few = {"prefix": draw(st.integers(0, 6)), "sinks": draw(st.integers(0, 6)) if window != (None, None) else 0}
    if not causal and window == (None, None):
        few["prefix"] = 0
    edges = [np.array([0, queries]), np.array([0, keys])]
    if draw(st.booleans()):
        inner = draw(st.integers(0, 6))
        edges = [
            np.array([0, *sorted(draw(st.lists(st.integers(0, end), min_size=inner, max_size=inner))), end])
            for end in (queries, keys)
        ]
    mask = Mask(*edges, causal=causal, left=window[0], right=window[1], **few)
    matrix, _ = mask_by_definition(
        1, queries, keys, causal=causal, window_size=window, cu_seqlens_q=edges[0], cu_seqlens_k=edges[1],
        prefix=few["prefix"], sink_tokens=few["sinks"],
    )  # fmt: skip
    return mask, matrix[0]


@st.composite
def grids(draw: st.DrawFn, queries: int, keys: int) -> ChunkGrid:
    """Chunks of some of the rows and all keys; the last ones may have none."""
    start = draw(st.sampled_from([0, draw(st.integers(0, queries - 1))]))
    stop = draw(st.sampled_from([queries, draw(st.integers(start + 1, queries))]))
    counts = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    if draw(st.booleans()):
        counts = counts[0], counts[0]
    rows, of_keys = (
        ceil_div(length, count) + draw(st.integers(0, 3)) for length, count in zip((stop - start, keys), counts, strict=True)
    )
    return ChunkGrid(start, stop, counts[0], rows, counts[1], of_keys)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_live_pairs_are_those_with_an_attended_key(data: st.DataObject) -> None:
    mask, matrix = data.draw(masks())
    grid = data.draw(grids(*matrix.shape))
    expected = np.zeros((grid.query_chunks, grid.key_chunks), bool)
    for query in range(grid.query_chunks):
        rows = grid.rows(query)
        for key in range(grid.key_chunks):
            keys = grid.keys(key, mask.keys)
            expected[query, key] = matrix[rows.start : rows.stop, keys.start : keys.stop].any()
    np.testing.assert_array_equal(live_pairs(mask, grid).matrix(), expected)


@given(st.data(), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_keys_needed_are_those_that_a_piece_of_rows_attends(data: st.DataObject, step: int) -> None:
    mask, matrix = data.draw(masks())
    grid = data.draw(grids(*matrix.shape))
    step = min(step, grid.chunk_rows)
    needed = []
    for chunk in range(grid.query_chunks):
        rows = grid.rows(chunk)
        for start in range(rows.start, rows.stop, step):
            needed.append(int(matrix[start : min(start + step, rows.stop)].any(0).sum()))
    assert keys_needed(mask, grid, step) == (sum(needed), max(needed))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_keys_of_quorums_are_those_that_their_pairs_need(data: st.DataObject) -> None:
    mask, matrix = data.draw(masks())
    grid = data.draw(grids(*matrix.shape))
    assume(grid.query_chunks == grid.key_chunks)
    division = CyclicQuorums(live_pairs(mask, grid))
    assume(not division.is_regular)
    needed = np.zeros((division.chunks, mask.keys), bool)
    for query in range(grid.query_chunks):
        rows = grid.rows(query)
        for key in live_pairs(mask, grid).keys(query):
            keys = grid.keys(key, mask.keys)
            needed[division.owner(query, key), keys.start : keys.stop] |= matrix[
                rows.start : rows.stop, keys.start : keys.stop
            ].any(0)
    assert keys_of_quorums(mask, grid, division) == needed.sum()


@given(st.data(), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_keys_decoded_are_those_of_the_chunks_that_rows_touch(data: st.DataObject, unit: int) -> None:
    mask, matrix = data.draw(masks())
    grid = data.draw(grids(*matrix.shape))
    assume(not mask.is_simple and grid.key_chunk_rows % unit == 0)
    touched = needed = 0
    for chunk in range(grid.query_chunks):
        attended = matrix[grid.rows(chunk).start : grid.rows(chunk).stop].any(0)
        needed += int(attended.sum())
        touched += sum(unit for low in range(0, mask.keys, unit) if attended[low : low + unit].any())
    assert times_keys_decoded(mask, grid, unit) == max(1.0, touched / max(1, needed))


@given(st.data(), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_pieces_do_not_cross_chunks(data: st.DataObject, step: int) -> None:
    grid = data.draw(grids(40, 40))
    edges = row_edges(grid, min(step, grid.chunk_rows)).tolist()
    assert edges == sorted(edges)
    assert {edges[0], edges[-1]} == {grid.start, grid.stop}
    assert {grid.rows(chunk).start for chunk in range(grid.query_chunks)} <= set(edges)
    assert max(np.diff(edges)) <= step


@pytest.mark.parametrize("mask", [Mask.of(10**6, 10**6), Mask.of(10**6, 10**6, causal=True)], ids=str)
def test_very_many_chunks_of_a_regular_mask_are_not_looked_at_one_by_one(mask: Mask) -> None:
    chunks = MOST_PRUNED + 3000
    live = live_pairs(mask, ChunkGrid(0, 10**6, chunks, ceil_div(10**6, chunks), chunks, ceil_div(10**6, chunks)))
    assert (live.is_full, live.is_triangular) == (mask.is_full, mask.causal)
