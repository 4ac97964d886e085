"""The ledger: entered from the mask's closed forms, it is what the pairs themselves add up to, and tells what went wrong."""

from __future__ import annotations

import itertools
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocattn.kernels.state import AttentionState
from oocattn.operations import ledger as ledger_module
from oocattn.operations.ledger import LedgerChecker, enter_tile
from oocattn.operations.tiles import Tile
from oocattn.problem.mask import Cover, Mask

merge_module = import_module("oocattn.kernels.merging")


def full(size: int) -> Mask:
    return Mask.of(size, size)


def causal(size: int) -> Mask:
    return Mask.of(size, size, causal=True)


def window(size: int, width: int, behind: int = 0) -> Mask:
    """The `width` keys that end `behind` keys before a row's position."""
    return Mask.of(size, size - behind, causal=True, left=width - 1)


def documents(size: int) -> Mask:
    """Three of them, with a window and a sink in each."""
    edges = np.array([0, size // 4, size // 4, size // 2, size])
    return Mask(edges, edges, causal=True, left=2, sinks=1)


def tile_of(mask: Mask, rows: range, keys: range, first: int = 0) -> Tile:
    """All of a rectangle as a tile, for a piece whose first row is token `first`."""
    local = range(rows.start - first, rows.stop - first)
    return Tile(mask, local, range(len(keys)), rows, (keys,), mask.cover(rows, keys))


def empty(rows: int) -> AttentionState:
    return AttentionState.empty(1, rows, 1)


def add(found: AttentionState, tile: Tile) -> None:
    enter_tile(found.rows(tile.rows.start, tile.rows.stop), tile)


@given(st.data(), st.integers(1, 30), st.integers(1, 9))
def test_tiles_in_any_cut_add_up_to_what_the_mask_says(data: st.DataObject, size: int, block: int) -> None:
    mask = data.draw(st.sampled_from([full(size), causal(size), window(size, 3), documents(size)]))
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    found = empty(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "_LEDGER_ROWS", block)
        for start, stop in itertools.pairwise(cuts):
            keys = range(start, stop)
            if live := mask.live_rows(range(size), [keys]):
                add(found, tile_of(mask, range(live[0].start, live[-1].stop), keys))
        assert LedgerChecker(block).find_wrong_row(found, range(size), mask) is None


def test_a_full_tile_may_be_of_several_runs_of_tokens() -> None:
    found = empty(4)
    add(found, Tile(full(9), range(1, 3), range(5), range(1, 3), (range(2, 4), range(6, 9)), Cover.FULL))
    assert found.keys.tolist() == [0, 5, 5, 0]
    assert found.key_sum.tolist() == [0, 26, 26, 0]


def test_sums_are_modulo_two_to_the_64() -> None:
    keys = range(1 << 46, 1 << 47)
    mask, found = full(1 << 47), empty(1)
    for _ in range(5):
        add(found, tile_of(mask, range(1), keys))
    assert int(found.key_sum[0]) % (1 << 64) == 5 * sum((keys.start, keys.stop - 1)) * len(keys) // 2 % (1 << 64)


@pytest.mark.parametrize("behind", [1, -1, 30])
def test_a_window_that_is_shifted_is_caught_though_it_has_as_many_keys(behind: int) -> None:
    right, shifted, rows = window(1000, 20), window(1000, 20, behind), range(500, 600)
    found = empty(len(rows))
    add(found, tile_of(shifted, rows, range(1000), rows.start))
    assert found.keys.tolist() == [20] * len(rows)
    assert LedgerChecker(64).find_wrong_row(found, rows, right) == 0


@pytest.mark.parametrize("most_pieces", [0, 64])
@pytest.mark.parametrize("mask", [full(100), causal(100), window(100, 7), documents(100)], ids=str)
def test_the_first_wrong_row_is_named(monkeypatch: pytest.MonkeyPatch, mask: Mask, most_pieces: int) -> None:
    """Row by row, in memory that is used again, and among several documents, few or many."""
    monkeypatch.setattr(ledger_module, "MOST_PIECES", most_pieces)
    monkeypatch.setattr(ledger_module, "ROWS_OF_MANY", 9)
    rows, found, checker = range(30, 100), empty(70), LedgerChecker(16)
    add(found, tile_of(mask, rows, range(100), rows.start))
    assert checker.find_wrong_row(found, rows, mask) is None
    for field in (found.keys, found.key_sum):
        for row in (69, 37, 16, 0):
            for wrong in (1, -1, 1 << 40):
                field[row] += wrong
                assert checker.find_wrong_row(found, rows, mask) == row
                field[row] -= wrong
    assert checker.find_wrong_row(found, rows, mask) is None


@given(st.data(), st.integers(1, 30))
def test_a_ledger_of_another_mask_is_found_wrong_where_that_differs_first(data: st.DataObject, size: int) -> None:
    kinds = [full(size), causal(size), window(size, 3), window(size, 4), window(size, 3, -2), documents(size)]
    right, other = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(kinds))
    found = empty(size)
    add(found, Tile(other, range(size), range(other.keys), range(size), (range(other.keys),), Cover.PARTIAL))
    differ = [row for row in range(size) if keys_of(right, row) != keys_of(other, row)]
    assert LedgerChecker(size).find_wrong_row(found, range(size), right) == (differ[0] if differ else None)


def keys_of(mask: Mask, row: int) -> tuple[int, int]:
    """The number of keys that a row attends, and the sum of their indices."""
    keys = [key for part in mask.key_ranges(row) for key in part]
    return len(keys), sum(keys)
