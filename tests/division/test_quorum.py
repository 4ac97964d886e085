"""Cyclic quorums: every chunk pair owned exactly once, loads level, only what is needed is read, all of it quickly."""

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.division.base import Division, Subproblem
from oocattn.division.quorums import CyclicQuorums, candidate_chunk_counts, quorum_size

LARGE = 9507

divisions = st.builds(CyclicQuorums, st.integers(1, 80), st.booleans())


def owned_pairs(part: Subproblem) -> list[tuple[int, int]]:
    """Every (query chunk, key chunk) of a subproblem, as often as its blocks name it."""
    pairs = [(block.query_chunk, key) for block in part.blocks for key in block.key_chunks]
    return pairs + [(block.query_chunk, block.query_chunk) for block in part.blocks if block.diagonal]


def check_division(division: Division) -> None:
    """The promises of `Division` and its records, by walking everything."""
    owners = {}
    contributors: dict[int, list[int]] = {chunk: [] for chunk in range(division.chunks)}
    for index in range(division.subproblems):
        part = division.subproblem(index)
        pairs = owned_pairs(part)
        assert not owners.keys() & set(pairs)
        assert len(pairs) == len(set(pairs))
        owners.update(dict.fromkeys(pairs, index))
        assert part.index == index
        assert part.query_chunks == tuple(sorted({query for query, _ in pairs}))
        assert part.query_chunks == tuple(block.query_chunk for block in part.blocks)
        assert part.key_chunks == tuple(sorted({key for _, key in pairs}))
        for block in part.blocks:
            assert list(block.key_chunks) == sorted(block.key_chunks)
            assert block.query_chunk not in block.key_chunks
            contributors[block.query_chunk].append(index)
    chunks = range(division.chunks)
    attended = {(query, key) for query in chunks for key in chunks if not division.triangular or key <= query}
    assert owners.keys() == attended
    assert all(division.owner(*pair) == index for pair, index in owners.items())
    assert all(division.contributors(chunk) == tuple(indices) for chunk, indices in contributors.items())
    parts = [division.subproblem(index) for index in range(division.subproblems)]
    reads = sum(len(part.query_chunks) for part in parts), sum(len(part.key_chunks) for part in parts)
    assert division.chunk_reads() == reads
    several = any(len(division.subproblem(index).query_chunks) > 1 for index in range(division.subproblems))
    for lanes in (1, 2, 3, 8):
        of_chunks = division.chunk_lanes(lanes).tolist()
        assert len(of_chunks) == division.chunks
        assert set(of_chunks) <= set(range(1 if several else lanes))


@given(divisions)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_owned_once_and_only_what_is_needed_is_staged(division: CyclicQuorums) -> None:
    check_division(division)


@given(divisions)
@settings(max_examples=60, deadline=None)
def test_a_quorum_owns_its_diagonal_and_only_pairs_within_it(division: CyclicQuorums) -> None:
    for index in range(division.subproblems):
        quorum = division.quorum(index)
        part = division.subproblem(index)
        assert index in quorum
        assert len(quorum) == quorum_size(division.chunks)
        assert [block.query_chunk for block in part.blocks if block.diagonal] == [index]
        assert set(part.query_chunks) | set(part.key_chunks) <= set(quorum)


@pytest.mark.parametrize("chunks", range(1, 64))
def test_loads_are_level(chunks: int) -> None:
    full, causal = (
        [len(owned_pairs(division.subproblem(i))) for i in range(chunks)]
        for division in (CyclicQuorums(chunks, triangular=False), CyclicQuorums(chunks, triangular=True))
    )
    assert set(full) == {chunks}
    assert max(causal) - min(causal) == (1 if chunks % 2 == 0 else 0)
    if chunks in candidate_chunk_counts(chunks):
        k = quorum_size(chunks)
        assert set(causal) == {k * (k - 1) // 2 + 1}


@given(st.integers(1, 200), st.data())
def test_both_orders_of_a_pair_have_one_owner(chunks: int, data: st.DataObject) -> None:
    a, b = data.draw(st.tuples(*[st.integers(0, chunks - 1)] * 2))
    division = CyclicQuorums(chunks, triangular=False)
    apart = (division.owner(a, b) - division.owner(b, a)) % chunks
    assert apart == (chunks // 2 if 2 * (a - b) % chunks == 0 and a != b else 0)
    assert CyclicQuorums(chunks, triangular=True).owner(max(a, b), min(a, b)) == division.owner(max(a, b), min(a, b))


@pytest.mark.parametrize(("chunks", "rows"), [(1, 3.0), (3, 4.3), (7, 6.6), (13, 9.3), (31, 15.1), (57, 21.1)])
def test_rows_read(chunks: int, rows: float) -> None:
    query, key = CyclicQuorums(chunks, triangular=True).chunk_reads()
    assert round((query + 2 * key) / chunks, 1) == rows
    k = quorum_size(chunks)
    assert CyclicQuorums(chunks, triangular=False).chunk_reads() == (k * chunks, k * chunks)


@pytest.mark.parametrize("chunks", candidate_chunk_counts(LARGE)[1:])
def test_causal_reads_of_perfect_sets_follow_their_formula(chunks: int) -> None:
    query, key = CyclicQuorums(chunks, triangular=True).chunk_reads()
    k = quorum_size(chunks)
    assert query + 2 * key == (3 * k - 3) * chunks + 4 + (chunks == 21)


def test_the_undivided_call() -> None:
    part = CyclicQuorums(1, triangular=True).subproblem(0)
    assert (part.query_chunks, part.key_chunks) == ((0,), (0,))
    assert [(block.query_chunk, block.key_chunks, block.diagonal) for block in part.blocks] == [(0, (), True)]


def test_the_drawn_example() -> None:
    drawn = ["0022606", "0113301", "2122441", "2323355", "6343446", "0045455", "6115656"]
    division = CyclicQuorums(7, triangular=False)
    assert ["".join(str(division.owner(a, b)) for b in range(7)) for a in range(7)] == drawn


@pytest.mark.parametrize("chunks", [LARGE, 10_000])
def test_large_counts_are_lazy(chunks: int) -> None:
    division = CyclicQuorums(chunks, triangular=True)
    began = time.perf_counter()
    division.chunk_reads()  # makes the tables
    assert time.perf_counter() - began < 1
    calls = {
        lambda: division.owner(5000, 17): 20e-6,
        lambda: division.quorum(5000): 200e-6,
        lambda: division.contributors(5000): 200e-6,
        lambda: division.chunk_reads(): 1e-3,
        lambda: division.subproblem(5000): 50e-3,
    }
    for call, limit in calls.items():
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < limit
    assert len(pickle.dumps(division)) < 200


@given(st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=40)
def test_large_counts_agree_with_themselves(query: int, data: st.DataObject) -> None:
    division = CyclicQuorums(10_001, triangular=True)
    key = data.draw(st.integers(0, query))
    index = division.owner(query, key)
    assert (query, key) in owned_pairs(division.subproblem(index))
    assert index in division.contributors(query)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CyclicQuorums(0, triangular=True)
    division = CyclicQuorums(7, triangular=True)
    with pytest.raises(ValueError, match="triangular"):
        division.owner(2, 3)
    for call in (division.quorum, division.subproblem, division.contributors, lambda i: division.owner(i, 0)):
        for index in (-1, 7):
            with pytest.raises(IndexError, match="expected 0 to 6"):
                call(index)
