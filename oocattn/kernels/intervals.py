"""Intervals: which keys the rows of one call attend, [n, 4] in host memory.

Row i attends keys [a, b) and [c, d) of the call, for its a, b, c, d = intervals[i]; None stands for all keys with every row.
They come from `problem.mask`, which makes them ascend from row to row; an interval may be empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from oocattn.problem.mask import Mask

Int32s = npt.NDArray[np.int32]


class Band(NamedTuple):
    """Row i attends keys [i + lower, i + upper), as far as there are such keys."""

    lower: int
    upper: int

    def is_open_below(self, rows: int) -> bool:
        """Whether every one of so many rows attends the keys from the first on."""
        return self.lower <= 1 - rows


def make_intervals(mask: Mask, rows: range, keys: range) -> torch.Tensor:
    """The intervals of consecutive rows within `keys`, as kernels take them."""
    return torch.from_numpy(mask.intervals(rows, keys))


def find_band(intervals: torch.Tensor | None, rows: int, keys: int) -> Band | None:
    """The band of a call; None for intervals of another shape.

    A triangle with its corner at the first row and key is Band(1 - rows or less, 1), all keys are Band(-rows, keys).
    """
    if intervals is None:
        return Band(-rows, keys)
    a, b, c, d = intervals.numpy().T
    if not np.array_equal(c, d):
        return None
    lower, upper = _slope(a, keys), _slope(b, keys)
    return None if lower is None or upper is None else Band(lower, upper)


def _slope(bounds: Int32s, keys: int) -> int | None:
    """The number s such that each bound is row + s, within 0 and `keys`; or None."""
    rows = len(bounds)
    between = np.flatnonzero((bounds > 0) & (bounds < keys))
    if len(between):
        slope = int(bounds[between[0]]) - int(between[0])
    else:
        zeros = int(np.count_nonzero(bounds == 0))
        slope = keys if not zeros else -rows if zeros == rows else 1 - zeros
    expected = np.clip(np.arange(slope, slope + rows, dtype=np.int64), 0, keys)
    return slope if np.array_equal(bounds, expected) else None


def within(intervals: torch.Tensor | None, first_row: int, last_row: int, first_key: int, last_key: int) -> Int32s | None:
    """The intervals of a tile of a call: int32 [rows, 4]; None where it is full.

    They are relative to the tile's first key.
    """
    if intervals is None:
        return None
    found: Int32s = intervals[first_row:last_row].numpy().clip(first_key, last_key) - np.int32(first_key)
    a, b, c, d = found.T
    return None if ((b - a) + (d - c) == last_key - first_key).all() else found
