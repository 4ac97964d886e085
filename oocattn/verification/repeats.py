"""Keys that came before: equal keys have equal rounding errors, which add up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST_SLOTS = 1 << 20  # counts that are kept, at most. Where keys are many more, some that differ share a count.


def slots_for(keys: int) -> int:
    """Counts that are kept for so many keys."""
    return min(MOST_SLOTS, 1 << (8 * keys - 1).bit_length())


class Repeats:
    """Counts the keys of one head as they come, by a hash of their bits."""

    def __init__(self, keys: int, head_dim: int) -> None:
        self._counts = np.zeros(slots_for(keys), np.uint32)
        self._factors = np.random.default_rng(0).integers(0, 1 << 64, head_dim, np.uint64) | np.uint64(1)

    def count(self, key: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Which occurrence of itself each key [n, D] is: [n], 1 for the first."""
        bits = key.view(np.uint64)
        mixed = bits ^ (bits >> np.uint64(31))  # a sign alone would reach the highest bit alone
        sums = (mixed * self._factors).sum(axis=1, dtype=np.uint64)
        slots = (sums >> np.uint64(65 - len(self._counts).bit_length())).astype(np.int64)
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))  # of each run of equal slots
        lengths = np.diff(first, append=len(ordered))
        found = np.empty(len(key))
        found[order] = np.arange(1, len(key) + 1) - np.repeat(first, lengths) + self._counts[ordered]
        self._counts[ordered[first]] += lengths.astype(np.uint32)
        return found
