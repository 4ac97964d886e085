"""Strips: every chunk pair owned exactly once, indices by arithmetic, closed forms equal to the walk."""

import numpy as np
import pytest
from dividing import any_live, check_division
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.division.base import Block
from oocattn.division.live import LivePairs
from oocattn.division.strips import Strips

sizes = st.integers(1, 40)
regular = st.one_of(sizes.map(LivePairs.triangular), st.builds(LivePairs.full, sizes, sizes))
divisions = st.builds(Strips, st.one_of(regular, any_live(sizes, sizes)), st.integers(1, 45))


@given(divisions)
@settings(max_examples=80, deadline=None)
def test_every_pair_is_owned_once_and_only_what_is_needed_is_staged(division: Strips) -> None:
    check_division(division)


@given(divisions)
@settings(max_examples=40, deadline=None)
def test_indices_are_query_chunk_major_and_a_span_is_of_the_keys_that_are_attended(division: Strips) -> None:
    parts = [division.subproblem(index) for index in division.indices]
    order = [(part.query_chunks[0], part.key_chunks[0]) for part in parts]
    assert order == sorted(order)
    assert all(len(part.blocks) == 1 for part in parts)
    assert all(division.live.keys(query).index(key) % division.span == 0 for query, key in order)


def test_blocks_of_a_full_and_a_causal_strip() -> None:
    assert Strips(LivePairs.full(7, 7), 3).subproblem(13).blocks == (Block(4, (3, 4, 5)),)
    causal = Strips(LivePairs.triangular(7), 3)
    assert causal.subproblem(6).blocks == (Block(4, (3, 4)),)
    assert causal.subproblem(5).blocks == (Block(4, (0, 1, 2)),)
    assert causal.contributors(6) == (9, 10, 11)


def test_a_strip_skips_keys_that_are_dead() -> None:
    """Of chunks 0, 4, 5 and 6 of 7, as sinks and a window leave them; another query chunk attends none."""
    owners, starts, stops = np.array([[1, 0, 1], [1, 4, 7], [2, 6, 7]]).T
    strips = Strips(LivePairs.of_ranges(3, 7, owners, starts, stops), 3)
    assert [strips.subproblem(index).blocks for index in strips.indices] == [
        (Block(1, (0, 4, 5)),), (Block(1, (6,)),), (Block(2, (6,)),)
    ]  # fmt: skip
    assert [strips.contributors(chunk) for chunk in range(3)] == [(), (0, 1), (2,)]


def test_a_decode_step_is_divided_along_the_keys() -> None:
    strips = Strips(LivePairs.full(1, 1000), 10)
    assert len(strips.indices) == 100
    assert strips.owner(0, 999) == 99
    assert strips.chunk_reads() == (100, 1000)


def test_large_counts_need_only_arithmetic() -> None:
    division = Strips(LivePairs.triangular(1_000_003), 1000)
    index = division.owner(999_999, 777_777)
    part = division.subproblem(index)
    assert part.query_chunks == (999_999,)
    assert 777_777 in part.key_chunks
    assert division.subproblem(division.indices[-1]).query_chunks == (1_000_002,)
    assert division.chunk_reads() == (len(division.indices), 1_000_003 * 1_000_004 // 2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Strips(LivePairs.full(1, 1), 0)
    division = Strips(LivePairs.triangular(4), 2)
    with pytest.raises(ValueError, match="query chunk 1 does not attend key chunk 2"):
        division.owner(1, 2)
    with pytest.raises(IndexError, match="expected 0 to 5"):
        division.subproblem(6)
    for chunk in (-1, 4):
        with pytest.raises(IndexError, match="expected 0 to 3"):
            division.contributors(chunk)
        with pytest.raises(IndexError, match="expected 0 to 3"):
            division.owner(0, chunk)
