"""Keys that came before: equal keys have equal rounding errors, which add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

USUAL_SLOTS, KEYS_OF_SLOT = 1 << 20, 4
"""Counts that are kept, at most: so many, or of more keys a quarter. Keys that differ share a count then, and more error is
allowed of them than they may have."""

_HASHED = 1 << 15  # words of keys that are hashed at a time: few enough for a core's own cache
_WORDS = (np.uint64, np.uint32, np.uint16)

Int64s = npt.NDArray[np.int64]


def slots_for(keys: int) -> int:
    """Counts that are kept for so many keys: a power of two."""
    most = max(USUAL_SLOTS, keys // KEYS_OF_SLOT)
    return 1 << (min(8 * keys, most) - 1).bit_length()


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
        shifts = before - self.first
        place = np.ones(len(self.order), np.int64)  # summed up: of each key in its run, and what came before
        place[self.first[1:]] += np.diff(shifts)
        place[0] += shifts[0]
        found = np.empty(len(self.order))
        found[self.order] = np.cumsum(place, out=place)  # np.repeat would hold Python's lock
        return found


class Repeats:
    """Counts the keys of one head, rows of so many bytes, tile by tile, by a hash of their bits.

    Any thread may `sort` a tile at any time; tiles are counted in their order.
    """

    def __init__(self, keys: int, row_bytes: int) -> None:
        self._counts = np.zeros(slots_for(keys), np.uint32)
        self._word = next(word for word in _WORDS if row_bytes % np.dtype(word).itemsize == 0)
        words = row_bytes // np.dtype(self._word).itemsize
        self._factors = np.random.default_rng(0).integers(0, 1 << 64, words, np.uint64) | np.uint64(1)

    def sort(self, key: npt.NDArray[Any]) -> EqualKeys:
        """Bring the keys [n, D] of a tile, as they are stored, together by their slots."""
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

    def _hash(self, key: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """A hash of each key [n, D]: [n]."""
        words, found = key.view(self._word), np.empty(len(key), np.uint64)
        rows = max(1, _HASHED // words.shape[1])
        for first in range(0, len(key), rows):
            part = words[first : first + rows].astype(np.uint64)
            part ^= part >> np.uint64(31)  # a sign alone would reach the highest bit alone
            np.einsum("nd,d->n", part, self._factors, out=found[first : first + len(part)])
        return found
