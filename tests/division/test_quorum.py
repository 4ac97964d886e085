"""Cyclic quorums: every chunk pair owned exactly once, loads level, only what is needed is read, all of it quickly."""

import time

import pytest
from dividing import any_live, check_division, owned_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.division.base import Block
from oocattn.division.live import LivePairs
from oocattn.division.quorums import CyclicQuorums, candidate_chunk_counts, quorum_size

LARGE = 9507


def full(chunks: int) -> CyclicQuorums:
    return CyclicQuorums(LivePairs.full(chunks, chunks))


def triangular(chunks: int) -> CyclicQuorums:
    return CyclicQuorums(LivePairs.triangular(chunks))


regular = st.builds(lambda kind, chunks: kind(chunks), st.sampled_from([full, triangular]), st.integers(1, 80))
divisions = st.one_of(regular, any_live(st.integers(1, 40)).map(CyclicQuorums))


@given(divisions)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_owned_once_and_only_what_is_needed_is_staged(division: CyclicQuorums) -> None:
    check_division(division)


@given(divisions)
@settings(max_examples=60, deadline=None)
def test_a_quorum_owns_its_diagonal_and_only_pairs_within_it(division: CyclicQuorums) -> None:
    for index in range(division.chunks):
        quorum = division.quorum(index)
        part = division.subproblem(index)
        assert index in quorum
        assert len(quorum) == quorum_size(division.chunks)
        diagonal = [query for query, key in owned_pairs(part) if query == key]
        assert diagonal == ([index] if division.live.has(index, index) else [])
        assert set(part.query_chunks) | set(part.key_chunks) <= set(quorum)


@pytest.mark.parametrize("chunks", range(1, 64))
def test_loads_are_level(chunks: int) -> None:
    of_full, of_causal = (
        [len(owned_pairs(division.subproblem(i))) for i in range(chunks)] for division in (full(chunks), triangular(chunks))
    )
    assert set(of_full) == {chunks}
    assert max(of_causal) - min(of_causal) == (1 if chunks % 2 == 0 else 0)
    if chunks in candidate_chunk_counts(chunks):
        k = quorum_size(chunks)
        assert set(of_causal) == {k * (k - 1) // 2 + 1}


@given(st.integers(1, 200), st.data())
def test_both_orders_of_a_pair_have_one_owner(chunks: int, data: st.DataObject) -> None:
    a, b = data.draw(st.tuples(*[st.integers(0, chunks - 1)] * 2))
    division = full(chunks)
    apart = (division.owner(a, b) - division.owner(b, a)) % chunks
    assert apart == (chunks // 2 if 2 * (a - b) % chunks == 0 and a != b else 0)
    assert triangular(chunks).owner(max(a, b), min(a, b)) == division.owner(max(a, b), min(a, b))


@pytest.mark.parametrize(("chunks", "rows"), [(1, 3.0), (3, 4.3), (7, 6.6), (13, 9.3), (31, 15.1), (57, 21.1)])
def test_rows_read(chunks: int, rows: float) -> None:
    query, key = triangular(chunks).chunk_reads()
    assert round((query + 2 * key) / chunks, 1) == rows
    k = quorum_size(chunks)
    assert full(chunks).chunk_reads() == (k * chunks, k * chunks)


@pytest.mark.parametrize("chunks", candidate_chunk_counts(LARGE)[1:])
def test_causal_reads_of_perfect_sets_follow_their_formula(chunks: int) -> None:
    query, key = triangular(chunks).chunk_reads()
    k = quorum_size(chunks)
    assert query + 2 * key == (3 * k - 3) * chunks + 4 + (chunks == 21)


def test_the_undivided_call() -> None:
    part = triangular(1).subproblem(0)
    assert (part.query_chunks, part.key_chunks) == ((0,), (0,))
    assert part.blocks == (Block(0, (0,)),)


def test_the_drawn_example() -> None:
    drawn = ["0022606", "0113301", "2122441", "2323355", "6343446", "0045455", "6115656"]
    division = full(7)
    assert ["".join(str(division.owner(a, b)) for b in range(7)) for a in range(7)] == drawn


@pytest.mark.parametrize("chunks", [LARGE, 10_000])
def test_large_counts_are_lazy(chunks: int) -> None:
    division = triangular(chunks)
    began = time.process_time()
    division.chunk_reads()  # makes the tables
    assert time.process_time() - began < 1
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
            began = time.thread_time()
            call()
            seconds.append(time.thread_time() - began)
        assert min(seconds) < limit


@given(st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=40)
def test_large_counts_agree_with_themselves(query: int, data: st.DataObject) -> None:
    division = triangular(10_001)
    key = data.draw(st.integers(0, query))
    index = division.owner(query, key)
    assert (query, key) in owned_pairs(division.subproblem(index))
    assert index in division.contributors(query)


def test_refusals() -> None:
    for shape in ((0, 0), (3, 4), (4, 3)):
        with pytest.raises(ValueError, match=r"query chunks and . key chunks: expected as many"):
            CyclicQuorums(LivePairs.full(*shape))
    division = triangular(7)
    with pytest.raises(ValueError, match="query chunk 2 does not attend key chunk 3"):
        division.owner(2, 3)
    for call in (division.quorum, division.subproblem, division.contributors, lambda i: division.owner(i, 0)):
        for index in (-1, 7):
            with pytest.raises(IndexError, match="expected 0 to 6"):
                call(index)
