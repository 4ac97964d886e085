"""Keys that the rows of one call attend: the bounds of a mask, relative to the call's first row and first key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oocattn.problem.bounds import Bounds, Int64s, Ramps, hull
from oocattn.problem.mask import Mask

Int32s = npt.NDArray[np.int32]

_FAR = 1 << 30  # a position beyond any key of a call


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

    @cached_property
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

    @classmethod
    def of(cls, bounds: Bounds, rows: range, *keys: range) -> Intervals:
        """The intervals of a call that has these rows and ranges of keys, whose bounds are those of the rows within them."""
        if len(keys) == 1:
            return cls(len(rows), len(keys[0]), bounds.moved(rows.start, keys[0].start))
        return cls(len(rows), sum(map(len, keys)), bounds.moved(rows.start, 0).without_others(keys))

    @cached_property
    def reach(self) -> range:
        """The keys from the first that any row attends to the last."""
        bounds = self.bounds
        first = np.where(bounds.fixed > bounds.start, bounds.start, bounds.resume.at(bounds.edges[:-1]))
        low, high = int(first.min(initial=self.keys)), int(bounds.stop.at(bounds.edges[1:] - 1).max(initial=0))
        return range(low, max(low, high))

    def part(self, rows: range, keys: range) -> Intervals:
        """The intervals of a tile of the call."""
        return Intervals.of(self.bounds.part(rows).clipped(keys), rows, keys)

    def live_keys(self, rows: range) -> list[range]:
        """The keys of the call that any of some rows attends: ascending ranges that do not touch."""
        return self.bounds.part(rows).live_keys()

    def pieces(self) -> Iterator[tuple[range, Intervals]]:
        """The rows of each piece, and their intervals by themselves."""
        edges = self.bounds.edges
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if first < last:
                yield range(first, last), self.part(range(first, last), range(self.keys))

    @cached_property
    def table(self) -> Int64s:
        """The bounds' table with offsets and positions that 32 bits hold; the bounds stay what they are."""
        table = self.bounds.table.copy()
        table[:, 2:7:4] = table[:, 2:7:4].clip(-self.rows, self.keys)
        table[:, 9] = table[:, 9].clip(-_FAR, _FAR)
        return table

    def values(self) -> Int32s:
        """The bounds a <= b <= c <= d of every row: int32 [rows, 4]."""
        return self.bounds.values().astype(np.int32)

    def positions(self) -> Int64s:
        """The key at which each row is, from which distances are counted; it may be none of the call's: int64 [rows]."""
        return self.bounds.positions()


def make_intervals(mask: Mask, rows: range, *keys: range) -> Intervals:
    """What consecutive `rows` attend of some ascending ranges of keys, one after another, as kernels take it.

    No row attends a key between two of the ranges. Positions are right where no document has keys of two.
    """
    return Intervals.of(mask.bounds(rows, hull(keys)), rows, *keys)
