"""Keys that the rows of one call attend: a mask's four bounds of each row, or a band, where they have that shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oocattn.problem.mask import Mask, Ramp

Int32s = npt.NDArray[np.int32]


class Band(NamedTuple):
    """Row i attends keys [i + lower, i + upper), as far as there are such keys."""

    lower: int
    upper: int

    def is_open_below(self, rows: int) -> bool:
        """True if every one of so many rows attends the keys from the first on."""
        return self.lower <= 1 - rows


@dataclass(frozen=True)
class Intervals:
    """Row i attends keys [a, b) and [c, d): `ramps` are a <= b <= c <= d of i."""

    rows: int
    keys: int
    ramps: tuple[Ramp, Ramp, Ramp, Ramp]

    @property
    def band(self) -> Band | None:
        """The band that these are, such as (1 - rows, 1) of a triangle; None where the bounds have another shape."""
        a, b, c, d = self.ramps
        lower, upper = self._slope(a), self._slope(b)
        if lower is None or upper is None or c.before(self.rows) < d.before(self.rows):
            return None
        return Band(lower, upper)

    def _slope(self, bound: Ramp) -> int | None:
        """The s such that the bound is i + s, within 0 and `keys`; None if there is none."""
        ends = bound.at(0), bound.at(self.rows - 1)
        for slope in (bound.offset, -self.rows, self.keys):
            same = Ramp(slope, 0, self.keys)  # both rise by 0 or 1 a row: equal at both ends, they are equal
            if (same.at(0), same.at(self.rows - 1)) == ends:
                return slope
        return None

    def part(self, first_row: int, last_row: int, first_key: int, last_key: int) -> Intervals | None:
        """The intervals of a tile of the call; None where its rows attend all its keys."""
        rows, keys = min(last_row, self.rows) - first_row, range(first_key, min(last_key, self.keys))
        ramps = tuple(_relative(ramp, first_row, keys) for ramp in self.ramps)
        a, b, c, d = (ramp.before(rows) for ramp in ramps)
        found = Intervals(rows, len(keys), ramps)  # type: ignore[arg-type]
        return None if (b - a) + (d - c) == rows * len(keys) else found

    def values(self) -> Int32s:
        """The bounds of every row: int32 [rows, 4]."""
        found = np.empty((self.rows, 4), np.int32)
        for column, ramp in enumerate(self.ramps):
            found[:, column] = ramp.values(range(self.rows))
        return found


def make_intervals(mask: Mask, rows: range, keys: range) -> Intervals:
    """The part of `keys` that consecutive `rows` attend, as kernels take it."""
    ramps = tuple(_relative(ramp, rows.start, keys) for ramp in mask.ramps)
    return Intervals(len(rows), len(keys), ramps)  # type: ignore[arg-type]


def _relative(ramp: Ramp, first_row: int, keys: range) -> Ramp:
    """A bound in `keys`, from the first of them, by the row from `first_row` on."""
    clipped = ramp.clipped(keys)
    return Ramp(clipped.offset + first_row - keys.start, clipped.least - keys.start, clipped.most - keys.start)
