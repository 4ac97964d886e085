"""Keys that the rows of one call attend: the bounds of a mask, relative to the call's first row and first key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oocattn.problem.bounds import Bounds, Int64s, Ramps
from oocattn.problem.mask import Mask

Int32s = npt.NDArray[np.int32]


class Band(NamedTuple):
    """Row i attends keys [i + lower, i + upper), as far as there are such keys."""

    lower: int
    upper: int

    def is_open_below(self, rows: int) -> bool:
        """True if every one of so many rows attends the keys from the first on."""
        return self.lower <= 1 - rows


@dataclass(frozen=True, eq=False)
class Intervals:
    """Row i attends keys [a, b) and [c, d) of the call: `bounds` say which, piece by piece."""

    rows: int
    keys: int
    bounds: Bounds

    @property
    def is_full(self) -> bool:
        """True if every row attends every key."""
        return int(self.bounds.pairs().sum()) == self.rows * self.keys

    @property
    def band(self) -> Band | None:
        """The band that these are, such as (1 - rows, 1) of a triangle; None where the bounds have another shape."""
        bounds = self.bounds
        if len(bounds.start) != 1 or int(bounds.start[0]) != int(bounds.fixed[0]):
            return None  # of several documents, or some keys are attended before a hole
        starts, stop = bounds.resume, bounds.stop
        lower, upper = self._slope(starts), self._slope(stop)
        return None if lower is None or upper is None else Band(lower, upper)

    def _slope(self, bound: Ramps) -> int | None:
        """The s such that the bound is i + s, within 0 and `keys`; None if there is none."""
        offset, least, most = (int(numbers[0]) for numbers in (bound.offset, bound.least, bound.most))
        ends = [min(max(row + offset, least), most) for row in (0, self.rows - 1)]
        for slope in (offset, -self.rows, self.keys):
            # Both rise by 0 or 1 a row: equal at both ends, they are equal.
            if [min(max(row + slope, 0), self.keys) for row in (0, self.rows - 1)] == ends:
                return slope
        return None

    def part(self, rows: range, keys: range) -> Intervals:
        """The intervals of a tile of the call."""
        return Intervals(len(rows), len(keys), _relative(self.bounds.part(rows), rows, keys))

    def live_keys(self, rows: range) -> list[range]:
        """The keys of the call that any of some rows attends: ascending ranges that do not touch."""
        return self.bounds.part(rows).live_keys()

    def pieces(self) -> Iterator[tuple[range, Intervals]]:
        """The rows of each piece, and their intervals by themselves."""
        edges = self.bounds.edges
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if first < last:
                yield range(first, last), self.part(range(first, last), range(self.keys))

    def values(self) -> Int32s:
        """The bounds a <= b <= c <= d of every row: int32 [rows, 4]."""
        return self.bounds.values().astype(np.int32)

    def positions(self) -> Int64s:
        """The key at which each row is, from which distances are counted; it may be none of the call's: int64 [rows]."""
        return self.bounds.positions()


def make_intervals(mask: Mask, rows: range, keys: range) -> Intervals:
    """The part of `keys` that consecutive `rows` attend, as kernels take it."""
    return Intervals(len(rows), len(keys), _relative(mask.bounds(rows), rows, keys))


def _relative(bounds: Bounds, rows: range, keys: range) -> Bounds:
    return bounds.clipped(keys).moved(rows.start, keys.start)
