"""Keys that came before are counted, whatever tiles they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from oocattn.verification.repeats import Repeats, slots_for


def count(repeats: Repeats, keys: NDArray[Any]) -> NDArray[np.float64]:
    """Which occurrence of itself each key of the next tile is."""
    found = repeats.sort(keys)
    return found.occurrences(repeats.count(found))


@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 8), ("float32", 3), ("float16", 8), ("float16", 6), ("float16", 3)])
def test_occurrences_are_counted(tile: int, dtype: str, dim: int) -> None:
    random = np.random.default_rng(0)
    different, chosen = random.standard_normal((40, dim)).astype(dtype), random.integers(40, size=1000)
    expected = [int((chosen[: place + 1] == key).sum()) for place, key in enumerate(chosen)]
    keys = different[chosen]
    repeats = Repeats(1 << 17, keys.shape[1] * keys.itemsize)  # of so few, hardly any share a count
    found = [count(repeats, keys[start : start + tile]) for start in range(0, 1000, tile)]
    assert np.concatenate(found).tolist() == expected


def test_tiles_may_be_sorted_before_those_ahead_of_them_are_counted() -> None:
    random = np.random.default_rng(0)
    tiles = random.standard_normal((40, 8))[random.integers(40, size=(5, 200))]
    one, other = Repeats(1000, 64), Repeats(1000, 64)
    found = [one.sort(tile) for tile in reversed(tiles)]
    for tile, equal in zip(tiles, reversed(found), strict=True):
        assert equal.occurrences(one.count(equal)).tolist() == count(other, tile).tolist()


@pytest.mark.parametrize("kind", ["normal", "signs", "one element"])
def test_different_keys_are_hardly_ever_taken_for_equal(kind: str) -> None:
    random = np.random.default_rng(1)
    keys = random.standard_normal((5000, 32)).astype(np.float16)
    if kind == "signs":
        keys = np.unique(np.sign(keys), axis=0)
    elif kind == "one element":
        keys[:, 1:] = 1.0
        keys = np.unique(keys, axis=0)
    counted = count(Repeats(5000, 64), keys)
    assert (counted > 1).mean() < 0.15  # some share a count
    assert (counted > 3).sum() == 0


def test_counts_take_little_memory() -> None:
    found = [slots_for(keys) for keys in (1, 100, 1 << 17, 1 << 22, 1 << 24, 1 << 30)]
    assert found == [8, 1024, 1 << 20, 1 << 20, 1 << 22, 1 << 28]
