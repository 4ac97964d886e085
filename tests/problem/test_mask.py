"""Masks: everything that one is asked follows from the keys that each row attends, as a dense matrix has them.

The matrix is made by definition (`reference`), pair by pair.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Bools, mask_by_definition

from oocattn.kernels.intervals import make_intervals
from oocattn.problem.bounds import merge_ranges
from oocattn.problem.mask import Cover, Mask


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, Bools]:
    """A mask with any of documents, causality, window, prefix and sinks, and the matrix that it is."""
    documents = draw(st.sampled_from([1, 1, 2, 5]))
    least, most = (0, 6) if documents > 1 else (1, 12)
    lengths = st.lists(st.integers(least, most), min_size=documents, max_size=documents)
    rows = draw(lengths)
    keys = rows if draw(st.booleans()) else draw(lengths)
    edges = [np.cumsum([0, *counts]) for counts in (rows, keys)]
    causal, prefix, sinks = draw(st.booleans()), draw(st.sampled_from([0, 0, 1, 3])), draw(st.sampled_from([0, 0, 1, 3]))
    left, right = draw(st.sampled_from([None, 0, 1, 2, 4])), draw(st.sampled_from([None, 0, 1, 3]))
    mask = Mask(*edges, causal=causal, left=left, right=right, prefix=prefix, sinks=sinks)
    (attended,), _ = mask_by_definition(
        1, mask.queries, mask.keys, causal=causal, window_size=(left, right), cu_seqlens_q=edges[0], cu_seqlens_k=edges[1],
        prefix=prefix, sink_tokens=sinks,
    )  # fmt: skip
    return mask, attended


def part_of(draw: st.DrawFn, total: int) -> range:
    return range(*sorted((draw(st.integers(0, total)), draw(st.integers(0, total)))))


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[Mask, Bools, range, range]:
    """A mask, its matrix, and some rows and keys."""
    mask, attended = draw(masks())
    return mask, attended, part_of(draw, mask.queries), part_of(draw, mask.keys)


def within(attended: Bools, rows: range, keys: range) -> Bools:
    return attended[rows.start : rows.stop, keys.start : keys.stop]


def assert_ranges(found: list[range], expected: Bools, first: int) -> None:
    """Ranges are those of `expected`, whose first item is number `first`: ascending, and they do not touch."""
    assert all(one.stop < other.start for one, other in pairwise(found))
    assert [item for part in found for item in part] == [first + int(item) for item in np.flatnonzero(expected)]


@given(masks())
def test_a_row_attends_two_ascending_ranges_of_keys(case: tuple[Mask, Bools]) -> None:
    mask, attended = case
    for row in range(mask.queries):
        first, second = mask.key_ranges(row)
        assert 0 <= first.start <= first.stop <= second.start <= second.stop <= mask.keys
        assert [*first, *second] == np.flatnonzero(attended[row]).tolist()


@settings(max_examples=200)
@given(rectangles())
def test_ledger_pairs_and_cover_of_a_rectangle(case: tuple[Mask, Bools, range, range]) -> None:
    mask, attended, rows, keys = case
    part = within(attended, rows, keys)
    counts, sums = mask.ledger(rows, keys)
    np.testing.assert_array_equal(counts, part.sum(1))
    np.testing.assert_array_equal(sums, (part * np.arange(keys.start, keys.stop)).sum(1))
    assert mask.pairs(rows, keys) == part.sum()
    assert mask.pairs(rows) == attended[rows.start : rows.stop].sum()
    expected = Cover.DEAD if not part.any() else Cover.FULL if part.all() else Cover.PARTIAL
    assert mask.cover(rows, keys) is expected


@settings(max_examples=200)
@given(rectangles(), st.data())
def test_live_rows_and_keys_are_those_of_any_live_pair(case: tuple[Mask, Bools, range, range], data: st.DataObject) -> None:
    mask, attended, rows, keys = case
    assert_ranges(mask.live_keys(rows, keys), within(attended, rows, keys).any(0), keys.start)
    others = part_of(data.draw, mask.keys)
    either = np.zeros(mask.keys, bool)
    either[keys.start : keys.stop] = either[others.start : others.stop] = True
    live = (attended & either)[rows.start : rows.stop].any(1)
    assert_ranges(mask.live_rows(rows, [keys, others]), live, rows.start)


@settings(max_examples=200)
@given(rectangles())
def test_intervals_are_the_rows_of_a_rectangle(case: tuple[Mask, Bools, range, range]) -> None:
    mask, attended, rows, keys = case
    if not rows or not keys:
        return
    intervals = make_intervals(mask, rows, keys)
    part = within(attended, rows, keys)
    found = intervals.values()
    assert found.dtype == np.int32
    a, b, c, d = (column[:, None] for column in found.T)
    key = np.arange(len(keys))
    np.testing.assert_array_equal(((a <= key) & (key < b)) | ((c <= key) & (key < d)), part)
    assert intervals.is_full == part.all()
    band = intervals.band
    if band is not None:
        offset = key - np.arange(len(rows))[:, None]
        np.testing.assert_array_equal((band.lower <= offset) & (offset < band.upper), part)
    pieces = np.zeros_like(part)
    for of_rows, piece in intervals.pieces():
        a, b, c, d = (column[:, None] for column in piece.values().T)
        pieces[of_rows.start : of_rows.stop] = ((a <= key) & (key < b)) | ((c <= key) & (key < d))
    np.testing.assert_array_equal(pieces, part)


@given(masks())
def test_positions_are_aligned_with_the_last_key_of_a_document(case: tuple[Mask, Bools]) -> None:
    mask, _ = case
    found = mask.bounds(range(mask.queries)).positions()
    for first, last, key in zip(mask.query_edges, mask.query_edges[1:], mask.key_edges[1:], strict=False):
        assert found[first:last].tolist() == [*range(key - (last - first), key)]


@settings(max_examples=200)
@given(rectangles())
def test_a_split_has_every_pair_once_in_parts_of_one_cover(case: tuple[Mask, Bools, range, range]) -> None:
    mask, attended, rows, keys = case
    left = within(attended, rows, keys).copy()
    end = keys.start
    for part, cover in mask.split(rows, keys):
        assert end <= part.start < part.stop <= keys.stop
        end = part.stop
        assert cover is mask.cover(rows, part) is not Cover.DEAD
        left[:, part.start - keys.start : part.stop - keys.start] = False
    assert not left.any()


@settings(max_examples=200)
@given(masks(), st.data())
def test_pairs_and_live_keys_between_edges(case: tuple[Mask, Bools], data: st.DataObject) -> None:
    mask, attended = case
    edges = np.array(sorted(data.draw(st.lists(st.integers(0, mask.queries), min_size=2, max_size=5))))
    parts = [attended[start:stop] for start, stop in pairwise(edges)]
    assert mask.pairs_between(edges) == [part.sum() for part in parts]
    found = np.zeros((len(parts), mask.keys), bool)
    for part, start, stop in zip(*mask.live_keys_between(edges), strict=True):
        found[part, start:stop] = True
    np.testing.assert_array_equal(found, [part.any(0) for part in parts])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_merged_ranges_hold_the_same_items_and_do_not_touch(ranges: list[tuple[int, int]]) -> None:
    starts, stops = merge_ranges(*np.array(ranges, np.int64).reshape(-1, 2).T)
    found = [item for start, stop in zip(starts, stops, strict=True) for item in range(start, stop)]
    assert found == sorted({item for start, stop in ranges for item in range(start, stop)})
    assert np.all(starts[1:] > stops[:-1])


@given(masks())
def test_simple_masks_are_what_their_names_say(case: tuple[Mask, Bools]) -> None:
    mask, attended = case
    assert not mask.is_full or attended.all()
    assert not mask.is_triangular or np.array_equal(attended, np.tri(mask.queries))
    if mask.is_simple:
        counts = attended.sum(1)
        np.testing.assert_array_equal(attended, np.arange(mask.keys) < counts[:, None])


def test_the_matrices_of_full_and_causal() -> None:
    def matrix(mask: Mask) -> list[list[int]]:
        return [
            [int(any(key in part for part in mask.key_ranges(row))) for key in range(mask.keys)]
            for row in range(mask.queries)
        ]

    assert matrix(Mask.of(2, 3)) == [[1, 1, 1], [1, 1, 1]]
    assert matrix(Mask.of(2, 4, causal=True)) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert matrix(Mask.of(3, 2, causal=True)) == [[0, 0], [1, 0], [1, 1]]
    assert matrix(Mask.of(4, 4, causal=True, left=1, sinks=1)) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    assert matrix(Mask.of(3, 3, causal=True, prefix=2)) == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_a_causal_part_begins_with_the_own_key_of_its_first_row() -> None:
    assert [*Mask.of(10, 10, causal=True).split(range(4, 7), range(2, 9))] == [
        (range(2, 4), Cover.FULL),
        (range(4, 7), Cover.PARTIAL),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "full"),
        ({"causal": True}, "causal"),
        ({"causal": True, "left": 4095, "sinks": 4}, "causal, window of 4,095 before, 4 sinks"),
        ({"left": 10, "right": 0}, "window of 10 before and 0 after"),
        ({"right": 3}, "window of all before and 3 after"),
        ({"causal": True, "prefix": 1}, "causal, 1 prefix key"),
    ],
)
def test_words(options: dict[str, Any], words: str) -> None:
    assert str(Mask.of(100, 100, **options)) == words
    edges = np.array([0, 50, 100])
    assert str(Mask(edges, edges, **options)) == ", ".join(filter(None, [words if options else "", "2 documents"]))


def test_a_mask_is_pickled_without_what_follows_from_it() -> None:
    edges = np.arange(0, 3001, 3)
    mask = Mask(edges, edges, causal=True)
    before = len(pickle.dumps(mask))
    assert mask.pairs() == 6 * 1000
    assert mask.live_keys(range(3000)) == [range(3000)]
    assert len(pickle.dumps(mask)) == before
    assert pickle.loads(pickle.dumps(mask)).pairs() == mask.pairs()


def test_nothing_of_the_size_of_the_problem_is_made() -> None:
    size = 1 << 47
    mask = Mask.of(size, size, causal=True)
    assert mask.pairs() == size * (size + 1) // 2
    assert mask.pairs(range(size // 2, size), range(size // 4)) == size // 2 * (size // 4)
    window = Mask.of(size, size, causal=True, left=9)
    assert window.pairs() == 10 * size - 45
    assert window.live_keys(range(size - 5, size)) == [range(size - 14, size)]
    assert window.live_rows(range(size), [range(100, 200)]) == [range(100, 209)]
    _, sums = mask.ledger(range(size - 2, size))
    assert [int(found) % (1 << 64) for found in sums] == [n * (n - 1) // 2 % (1 << 64) for n in (size - 1, size)]


def test_pairs_of_many_long_documents_are_counted_exactly() -> None:
    edges = np.arange(0, (1 << 40) + 1, 1 << 30)
    assert Mask(edges, edges, causal=True).pairs() == 1024 * (1 << 29) * ((1 << 30) + 1)


@pytest.mark.parametrize("shift", [1, -1, 7])
def test_the_sum_of_indices_tells_a_shifted_window_from_the_right_one(shift: int) -> None:
    """Which a count does not: both attend as many keys."""
    size, rows = 1 << 40, range(1 << 20, (1 << 20) + 100)
    right, wrong = (Mask.of(size, size + moved, left=499, right=0).ledger(rows) for moved in (0, shift))
    np.testing.assert_array_equal(right[0], wrong[0])
    assert (right[1] != wrong[1]).all()
