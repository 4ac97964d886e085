"""Keys that came before: equal keys have equal rounding errors, which add up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_SLOTS = 1 << 20  # counts that are kept, at most. Where keys are many more, some that differ share a count.
_HASHED = 1 << 15  # elements of keys that are hashed at a time: few enough for a core's own cache

Int64s = npt.NDArray[np.int64]


def slots_for(keys: int) -> int:
    """Counts that are kept for so many keys."""
    return min(MOST_SLOTS, 1 << (8 * keys - 1).bit_length())


@dataclass(frozen=True)
class EqualKeys:
    """The keys of a tile, brought together by their slots: `order` [n] has their places.

    Keys of one slot are a run: `first` [runs] is its first place in `order`, `lengths` how many it has, `slots` its slot.
    """

    order: Int64s
    first: Int64s
    lengths: Int64s
    slots: Int64s

    def occurrences(self, before: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """Which occurrence of itself each key is: [n], 1 for the first, where `before` [runs] came before each run."""
        found = np.empty(len(self.order))
        found[self.order] = np.arange(1, len(self.order) + 1) + np.repeat(before - self.first, self.lengths)
        return found


class Repeats:
    """Counts the keys of one head, tile by tile, by a hash of their bits.

    Any thread may `sort` a tile at any time; tiles are counted in their order.
    """

    def __init__(self, keys: int, head_dim: int) -> None:
        self._counts = np.zeros(slots_for(keys), np.uint32)
        self._factors = np.random.default_rng(0).integers(0, 1 << 64, head_dim, np.uint64) | np.uint64(1)

    def sort(self, key: npt.NDArray[np.float64]) -> EqualKeys:
        """Bring the keys [n, D] of a tile together by their slots."""
        slots = (self._hash(key) >> np.uint64(65 - len(self._counts).bit_length())).astype(np.int64)
        bits = len(key).bit_length()
        placed = slots << bits | np.arange(len(key))
        placed.sort()  # by slots, and of equal ones by places: four times as fast as a stable argsort
        order, ordered = placed & ((1 << bits) - 1), placed >> bits
        first = np.flatnonzero(np.diff(ordered, prepend=-1))  # of each run of equal slots
        return EqualKeys(order, first, np.diff(first, append=len(ordered)), ordered[first])

    def count(self, found: EqualKeys) -> npt.NDArray[np.uint32]:
        """Count the keys of the next tile: how many came before each run of them, [runs]."""
        before = self._counts[found.slots]
        self._counts[found.slots] = before + found.lengths.astype(np.uint32)
        return before

    def _hash(self, key: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
        """A hash of each key [n, D]: [n]."""
        bits, found = key.view(np.uint64), np.empty(len(key), np.uint64)
        rows = max(1, _HASHED // key.shape[1])
        buffer = np.empty((min(rows, len(key)), key.shape[1]), np.uint64)
        for first in range(0, len(key), rows):
            part = bits[first : first + rows]
            mixed = np.right_shift(part, np.uint64(31), out=buffer[: len(part)])
            np.bitwise_xor(part, mixed, out=mixed)  # a sign alone would reach the highest bit alone
            np.einsum("nd,d->n", mixed, self._factors, out=found[first : first + len(part)])
        return found
