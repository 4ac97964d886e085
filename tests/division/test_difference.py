"""Difference sets and covers: every residue a difference, exactly once where a perfect set exists."""

import math
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.division.difference_sets import difference_cover, perfect_order
from oocattn.division.quorums import candidate_chunk_counts

PRIME_POWERS = [
    *(2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32, 37, 41, 43, 47, 49, 53, 59, 61, 64),
    *(67, 71, 73, 79, 81, 83, 89, 97),
]


def differences(cover: tuple[int, ...], modulus: int) -> Counter[int]:
    return Counter((x - y) % modulus for x in cover for y in cover if x != y)


@pytest.mark.parametrize("order", PRIME_POWERS)
def test_singer_set_makes_every_difference_exactly_once(order: int) -> None:
    modulus = order * order + order + 1
    began = time.process_time()
    cover = difference_cover(modulus)
    assert time.process_time() - began < 1
    assert len(cover) == order + 1
    assert differences(cover, modulus) == Counter(range(1, modulus))


def test_candidates_are_the_perfect_counts() -> None:
    assert candidate_chunk_counts(9507) == (1, 3, *(q * q + q + 1 for q in PRIME_POWERS))
    assert candidate_chunk_counts(0) == ()
    assert [c for c in range(1, 140) if perfect_order(c) is not None] == [1, 3, 7, 13, 21, 31, 57, 73, 91, 133]


@pytest.mark.parametrize("modulus", range(2, 260))
def test_small_cover_is_complete_canonical_and_has_no_redundant_element(modulus: int) -> None:
    cover = difference_cover(modulus)
    assert cover[0] == 0
    assert list(cover) == sorted({x % modulus for x in cover})
    assert set(differences(cover, modulus)) == set(range(1, modulus))
    for x in cover:
        fewer = tuple(y for y in cover if y != x)
        assert set(differences(fewer, modulus)) != set(range(1, modulus))


@given(st.integers(1, 10_500))
@settings(max_examples=40)
def test_any_modulus_has_a_small_cover_in_under_a_second(modulus: int) -> None:
    began = time.process_time()
    cover = difference_cover(modulus)
    assert time.process_time() - began < 1
    assert set(differences(cover, modulus)) == set(range(1, modulus))
    assert len(cover) < math.sqrt(1.5 * modulus) + 2


@pytest.mark.parametrize("modulus", range(1, 64))
def test_small_covers_are_within_one_of_the_counting_bound(modulus: int) -> None:
    bound = next(k for k in range(1, 20) if k * (k - 1) + 1 >= modulus)
    assert len(difference_cover(modulus)) <= bound + 1


def test_first_sets_and_refusals() -> None:
    assert [difference_cover(c) for c in (1, 2, 3, 7)] == [(0,), (0, 1), (0, 1), (0, 1, 5)]
    with pytest.raises(ValueError, match="at least 1"):
        difference_cover(0)
