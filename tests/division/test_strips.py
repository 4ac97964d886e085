"""Strips: every chunk pair owned exactly once, indices by arithmetic, closed forms equal to the walk."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quorum import check_division

from oocattn.division.base import Block
from oocattn.division.strips import Strips

divisions = st.builds(Strips, st.integers(1, 40), st.integers(1, 45), st.booleans())


@given(divisions)
@settings(max_examples=80, deadline=None)
def test_every_pair_is_owned_once_and_only_what_is_needed_is_staged(division: Strips) -> None:
    check_division(division)


@given(divisions)
@settings(max_examples=40, deadline=None)
def test_indices_are_query_chunk_major_and_strips_start_at_multiples_of_the_span(division: Strips) -> None:
    parts = [division.subproblem(index) for index in range(division.subproblems)]
    order = [(part.query_chunks[0], part.key_chunks[0]) for part in parts]
    assert order == sorted(order)
    assert all(len(part.blocks) == 1 for part in parts)
    assert all(key % division.span == 0 for _, key in order)


def test_blocks_of_a_full_and_a_causal_strip() -> None:
    assert Strips(7, 3, triangular=False).subproblem(13).blocks == (Block(4, (3, 5), diagonal=True),)
    causal = Strips(7, 3, triangular=True)
    assert causal.subproblem(6).blocks == (Block(4, (3,), diagonal=True),)
    assert causal.subproblem(5).blocks == (Block(4, (0, 1, 2), diagonal=False),)
    assert causal.contributors(6) == (9, 10, 11)


def test_large_counts_need_only_arithmetic() -> None:
    division = Strips(1_000_003, 1000, triangular=True)
    index = division.owner(999_999, 777_777)
    part = division.subproblem(index)
    assert part.query_chunks == (999_999,)
    assert 777_777 in part.key_chunks
    assert division.subproblem(division.subproblems - 1).query_chunks == (1_000_002,)
    assert division.chunk_reads() == (division.subproblems, 1_000_003 * 1_000_004 // 2)


def test_refusals() -> None:
    for chunks, span in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Strips(chunks, span, triangular=False)
    division = Strips(4, 2, triangular=True)
    with pytest.raises(ValueError, match="triangular"):
        division.owner(1, 2)
    with pytest.raises(IndexError, match="expected 0 to 5"):
        division.subproblem(6)
    with pytest.raises(IndexError, match="expected 0 to 3"):
        division.contributors(4)
