"""The promises of `Division` and its records, by walking everything; and live pairs of any pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from oocattn.division.base import Division, Subproblem
from oocattn.division.live import LivePairs


def live_of(matrix: NDArray[np.bool_]) -> LivePairs:
    """The live pairs of a dense matrix, a range for each."""
    queries, keys = matrix.shape
    owners, starts = np.nonzero(matrix)
    return LivePairs.of_ranges(queries, keys, owners, starts, starts + 1)


@st.composite
def matrices(
    draw: st.DrawFn, queries: st.SearchStrategy[int], keys: st.SearchStrategy[int] | None = None
) -> NDArray[np.bool_]:
    """Any pattern of pairs: few, many, or what a band leaves of them. As many key chunks as query chunks unless given."""
    rows = draw(queries)
    columns = rows if keys is None else draw(keys)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    matrix = random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    if draw(st.booleans()):
        distance = np.arange(columns) - np.arange(rows)[:, None] * columns // max(1, rows)
        matrix |= (-draw(st.integers(-1, columns)) <= distance) & (distance <= draw(st.integers(-1, columns)))
    return matrix


def any_live(queries: st.SearchStrategy[int], keys: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[LivePairs]:
    """Live pairs of any pattern."""
    return matrices(queries, keys).map(live_of)


def owned_pairs(part: Subproblem) -> list[tuple[int, int]]:
    """Every (query chunk, key chunk) of a subproblem, as often as its blocks name it."""
    return [(block.query_chunk, key) for block in part.blocks for key in block.key_chunks]


def check_division(division: Division) -> None:
    """The promises of `Division` and its records, by walking everything."""
    live, owners = division.live, {}
    contributors: dict[int, list[int]] = {chunk: [] for chunk in range(live.query_chunks)}
    parts = [division.subproblem(index) for index in division.indices]
    assert [part.index for part in parts] == [*division.indices] == sorted(set(division.indices))
    for part in parts:
        pairs = owned_pairs(part)
        assert pairs
        assert not owners.keys() & set(pairs)
        assert len(pairs) == len(set(pairs))
        assert sorted(zip(*(each.tolist() for each in division.pairs(part.index)), strict=True)) == pairs
        owners.update(dict.fromkeys(pairs, part.index))
        assert part.query_chunks == tuple(sorted({query for query, _ in pairs}))
        assert part.query_chunks == tuple(block.query_chunk for block in part.blocks)
        assert part.key_chunks == tuple(sorted({key for _, key in pairs}))
        for block in part.blocks:
            assert block.key_chunks
            assert list(block.key_chunks) == sorted(block.key_chunks)
            contributors[block.query_chunk].append(part.index)
    assert owners.keys() == {(query, key) for query in range(live.query_chunks) for key in live.keys(query)}
    assert all(division.owner(*pair) == index for pair, index in owners.items())
    assert all(division.contributors(chunk) == tuple(indices) for chunk, indices in contributors.items())
    for query in range(live.query_chunks):
        dead = next((key for key in range(live.key_chunks) if (query, key) not in owners), None)
        if dead is not None:
            with pytest.raises(ValueError, match=f"query chunk {query} does not attend key chunk {dead}"):
                division.owner(query, dead)
    assert division.chunk_reads() == (
        sum(len(part.query_chunks) for part in parts),
        sum(len(part.key_chunks) for part in parts),
    )
    several = any(len(part.query_chunks) > 1 for part in parts)
    for lanes in (1, 2, 3, 8):
        of_chunks = division.chunk_lanes(lanes).tolist()
        assert len(of_chunks) == live.query_chunks
        assert set(of_chunks) <= set(range(1 if several else lanes))
