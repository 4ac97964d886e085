"""Live pairs: everything that they are asked is what a dense matrix of pairs says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from dividing import live_of, matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oocattn.division.live import LivePairs

sizes = st.integers(1, 30)


def check_against(live: LivePairs, matrix: NDArray[np.bool_]) -> None:
    queries, keys = matrix.shape
    assert (live.query_chunks, live.key_chunks) == (queries, keys)
    np.testing.assert_array_equal(live.matrix(), matrix)
    assert live.counts.tolist() == matrix.sum(1).tolist()
    assert live.is_full == matrix.all()
    assert live.is_triangular == (queries == keys and (matrix == np.tri(queries, dtype=bool)).all())
    for query in range(queries):
        found = live.ranges(query)
        assert all(found)
        assert all(before.stop < after.start for before, after in itertools.pairwise(found))  # apart, ascending
        assert live.keys(query) == [key for part in found for key in part] == np.flatnonzero(matrix[query]).tolist()
        assert [live.has(query, key) for key in range(keys)] == matrix[query].tolist()


@given(matrices(sizes, sizes))
@settings(max_examples=80, deadline=None)
def test_live_pairs_are_those_of_a_dense_matrix(matrix: NDArray[np.bool_]) -> None:
    check_against(live_of(matrix), matrix)


@given(sizes, sizes, st.data())
@settings(max_examples=100, deadline=None)
def test_ranges_in_any_order_that_touch_and_overlap_are_joined(queries: int, keys: int, data: st.DataObject) -> None:
    edge = st.integers(0, keys - 1)
    part = st.tuples(st.integers(0, queries - 1), edge, edge).map(
        lambda drawn: (drawn[0], min(drawn[1:]), max(drawn[1:]) + 1)
    )
    parts = data.draw(st.lists(part, max_size=40))
    matrix = np.zeros((queries, keys), bool)
    for query, start, stop in parts:
        matrix[query, start:stop] = True
    owners, starts, stops = np.array(parts, np.int64).reshape(-1, 3).T
    check_against(LivePairs.of_ranges(queries, keys, owners, starts, stops), matrix)


@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_full_and_triangular_pairs(chunks: int) -> None:
    check_against(LivePairs.full(chunks, chunks), np.ones((chunks, chunks), bool))
    check_against(LivePairs.full(chunks, 5), np.ones((chunks, 5), bool))
    check_against(LivePairs.triangular(chunks), np.tri(chunks, dtype=bool))


@given(st.integers(1, 12), sizes)
@settings(max_examples=30, deadline=None)
def test_a_matrix_that_is_nearly_full_or_triangular_is_neither(chunks: int, at: int) -> None:
    for matrix in (np.ones((chunks, chunks), bool), np.tri(chunks, dtype=bool)):
        row, column = divmod(at % chunks**2, chunks)
        matrix[row, column] ^= True
        check_against(live_of(matrix), matrix)
