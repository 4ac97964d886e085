"""Masks: everything that one is asked follows from the keys that each row attends, as a matrix has them.

A new mask goes into `MASKS` here, and all of it holds for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from oocattn.problem.mask import Causal, Cover, Full, Mask, Ramp, make_mask


@dataclass(frozen=True)
class Windows(Mask):
    """A mask with both intervals, each bound of which moves: the keys about a row's position, and some further on."""

    width: int
    distance: int

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        starts = (-self.width, 1, 1 + self.distance, 2 + self.width + self.distance)
        a, b, c, d = (Ramp(start, 0, self.keys) for start in starts)
        return a, b, c, d

    def __str__(self) -> str:
        return "windows"


MASKS: tuple[Callable[[int, int, int], Mask], ...] = (
    lambda queries, keys, _: Full(queries, keys),
    lambda queries, keys, _: Causal(queries, keys),
    lambda queries, keys, size: Windows(queries, keys, size, 2 * size),
)
"""Each mask, for any numbers of queries and keys, and a number to choose anything else by."""

sizes = st.integers(1, 14)
masks = st.builds(lambda make, *numbers: make(*numbers), st.sampled_from(MASKS), sizes, sizes, st.integers(0, 5))


def matrix(mask: Mask) -> NDArray[np.int64]:
    """How often each row attends each key: [queries, keys]."""
    found = np.zeros((mask.queries, mask.keys), np.int64)
    for row in range(mask.queries):
        for keys in mask.key_ranges(row):
            found[row, keys.start : keys.stop] += 1
    return found


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[Mask, range, range]:
    mask = draw(masks)
    rows, keys = (
        range(*sorted((draw(st.integers(0, count)), draw(st.integers(0, count))))) for count in (mask.queries, mask.keys)
    )
    return mask, rows, keys


@given(masks)
def test_a_row_attends_two_ascending_ranges_of_keys_that_do_not_touch_each_other(mask: Mask) -> None:
    assert matrix(mask).max(initial=0) <= 1
    for row in range(mask.queries):
        first, second = mask.key_ranges(row)
        assert 0 <= first.start <= first.stop <= second.start <= second.stop <= mask.keys


def test_the_matrices_of_full_and_causal() -> None:
    np.testing.assert_array_equal(matrix(make_mask(3, 4, causal=False)), np.ones((3, 4)))
    np.testing.assert_array_equal(matrix(make_mask(4, 4, causal=True)), np.tri(4))
    np.testing.assert_array_equal(matrix(make_mask(2, 4, causal=True)), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(matrix(make_mask(3, 2, causal=True)), [[0, 0], [1, 0], [1, 1]])


@given(rectangles())
def test_counts_sums_pairs_and_cover_of_a_rectangle(case: tuple[Mask, range, range]) -> None:
    mask, rows, keys = case
    part = matrix(mask)[rows.start : rows.stop, keys.start : keys.stop]
    np.testing.assert_array_equal(mask.counts(rows, keys), part.sum(1))
    np.testing.assert_array_equal(mask.index_sums(rows, keys), (part * np.arange(keys.start, keys.stop)).sum(1))
    assert mask.pairs(rows, keys) == part.sum()
    expected = Cover.DEAD if not part.any() else Cover.FULL if part.all() else Cover.PARTIAL
    assert mask.cover(rows, keys) is expected
    live = np.flatnonzero(part.any(1)) + rows.start
    assert [*mask.live_rows(rows, keys)][:: max(1, len(live) - 1)] == [*live][:: max(1, len(live) - 1)]


@given(masks, st.data())
def test_counts_sums_and_pairs_over_all_keys(mask: Mask, data: st.DataObject) -> None:
    whole, first = matrix(mask), data.draw(st.integers(0, mask.queries))
    rows = range(first, mask.queries)
    np.testing.assert_array_equal(mask.counts(rows), whole[first:].sum(1))
    np.testing.assert_array_equal(mask.index_sums(rows), (whole[first:] * np.arange(mask.keys)).sum(1))
    assert mask.pairs() == whole.sum()
    before = mask.pairs_before(np.arange(mask.queries + 1, dtype=np.float64))
    np.testing.assert_array_equal(before, [0, *whole.sum(1).cumsum()])


@given(rectangles())
def test_intervals_are_the_rows_of_a_rectangle(case: tuple[Mask, range, range]) -> None:
    mask, rows, keys = case
    found = mask.intervals(rows, keys)
    assert found.dtype == np.int32
    key = np.arange(len(keys))
    a, b, c, d = (column[:, None] for column in found.T)
    attended = ((a <= key) & (key < b)) | ((c <= key) & (key < d))
    np.testing.assert_array_equal(attended, matrix(mask)[rows.start : rows.stop, keys.start : keys.stop])


@given(rectangles())
def test_a_split_has_every_pair_once_in_parts_of_one_cover(case: tuple[Mask, range, range]) -> None:
    mask, rows, keys = case
    left = matrix(mask)[rows.start : rows.stop]
    left[:, : keys.start] = left[:, keys.stop :] = 0
    end = keys.start
    for part, cover in mask.split(rows, keys):
        assert end <= part.start < part.stop <= keys.stop
        end = part.stop
        assert cover is mask.cover(rows, part) is not Cover.DEAD
        left[:, part.start : part.stop] = 0
    assert not left.any()


def test_a_causal_part_begins_with_the_own_key_of_its_first_row() -> None:
    assert [*Causal(10, 10).split(range(4, 7), range(2, 9))] == [
        (range(2, 4), Cover.FULL),
        (range(4, 7), Cover.PARTIAL),
    ]


@given(masks, st.integers(1, 5))
def test_a_triangular_mask_attends_the_chunks_before_none_after_and_of_itself_the_lower_triangle(
    mask: Mask, size: int
) -> None:
    if mask.triangular:
        np.testing.assert_array_equal(matrix(mask), np.tri(mask.queries))
    chunks = [range(start, min(start + size, mask.queries)) for start in range(0, mask.queries, size)]
    lower = all(
        mask.cover(rows, keys) is (Cover.FULL if keys.stop <= rows.start else Cover.DEAD)
        for rows in chunks
        for keys in chunks
        if rows != keys
    )
    assert mask.triangular <= lower


def test_nothing_of_the_size_of_the_problem_is_made() -> None:
    size = 1 << 47
    mask = Causal(size, size)
    assert mask.pairs() == size * (size + 1) // 2
    assert mask.pairs(range(size // 2, size), range(size // 4)) == size // 2 * (size // 4)
    last = range(size - 2, size)
    assert [count * (count - 1) // 2 % (1 << 64) for count in (size - 1, size)] == [
        int(found) % (1 << 64) for found in mask.index_sums(last)
    ]


@pytest.mark.parametrize("shift", [1, -1, 7])
def test_the_sum_of_indices_tells_a_shifted_window_from_the_right_one(shift: int) -> None:
    """Which a count does not: both attend as many keys."""
    right, wrong = (Ramp(offset, 0, 1 << 40).values(range(1 << 20, (1 << 20) + 100)) for offset in (-1000, shift - 1000))
    window = np.full(100, 500)
    from oocattn.problem.mask import _index_sums

    assert (_index_sums(right, right + window) != _index_sums(wrong, wrong + window)).all()
