"""The ledger: entered from the mask's closed forms, it is what the pairs themselves add up to, and tells what went wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocattn.kernels.state import AttentionState
from oocattn.operations import ledger as ledger_module
from oocattn.operations.ledger import enter_tile, find_wrong_row
from oocattn.operations.tiles import Tile
from oocattn.problem.mask import Causal, Cover, Full, Mask, Ramp

merge_module = import_module("oocattn.kernels.merging")


@dataclass(frozen=True)
class Window(Mask):
    """The `width` keys that end `behind` keys before a row's position."""

    width: int
    behind: int = 0

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        stop = 1 - self.behind
        end = Ramp.constant(self.keys)
        return Ramp(stop - self.width, 0, self.keys), Ramp(stop, 0, self.keys), end, end

    def __str__(self) -> str:
        return "window"


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
    mask = data.draw(st.sampled_from([Full(size, size), Causal(size, size), Window(size, size, 3)]))
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    found = empty(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "ROWS", block)
        patch.setattr(merge_module, "_LEDGER_ROWS", block)
        for start, stop in itertools.pairwise(cuts):
            keys = range(start, stop)
            if (rows := mask.live_rows(range(size), keys)) and mask.cover(rows, keys) is not Cover.DEAD:
                add(found, tile_of(mask, rows, keys))
        everything = range(size)
        assert find_wrong_row(found, everything, lambda rows: (mask.counts(rows), mask.index_sums(rows))) is None


def test_a_full_tile_may_be_of_several_runs_of_tokens() -> None:
    found = empty(4)
    add(found, Tile(Full(9, 9), range(1, 3), range(5), range(1, 3), (range(2, 4), range(6, 9)), Cover.FULL))
    assert found.keys.tolist() == [0, 5, 5, 0]
    assert found.key_sum.tolist() == [0, 26, 26, 0]


def test_sums_are_modulo_two_to_the_64() -> None:
    keys = range(1 << 46, 1 << 47)
    mask, found = Full(1 << 47, 1 << 47), empty(1)
    for _ in range(5):
        add(found, tile_of(mask, range(1), keys))
    assert int(found.key_sum[0]) % (1 << 64) == 5 * sum((keys.start, keys.stop - 1)) * len(keys) // 2 % (1 << 64)


@pytest.mark.parametrize("behind", [1, -1, 30])
def test_a_window_that_is_shifted_is_caught_though_it_has_as_many_keys(behind: int) -> None:
    right, shifted, rows = Window(1000, 1000, 20), Window(1000, 1000, 20, behind), range(500, 600)
    found = empty(len(rows))
    add(found, tile_of(shifted, rows, range(1000), rows.start))
    assert (found.keys.numpy() == right.counts(rows)).all()
    assert find_wrong_row(found, rows, lambda part: (right.counts(part), right.index_sums(part))) == 0


def test_the_first_wrong_row_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "ROWS", 16)
    mask, found = Causal(100, 100), empty(40)
    add(found, tile_of(mask, range(60, 100), range(100), 60))
    expected = lambda rows: (mask.counts(rows), mask.index_sums(rows))  # noqa: E731
    assert find_wrong_row(found, range(60, 100), expected) is None
    for field in (found.keys, found.key_sum):
        field[37] += 1
        assert find_wrong_row(found, range(60, 100), expected) == 37
        field[37] -= 1
