"""One document of a mask, in Python's own integers: what its rows and keys have to do with a rectangle.

`mask` says what the bounds mean. Of many documents `bounds` does the same with arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Ramp(NamedTuple):
    """A bound of rows that rises with them: row + offset, between `least` and `most`."""

    offset: int
    least: int
    most: int

    def at(self, row: int) -> int:
        """The bound of a row."""
        return min(max(row + self.offset, self.least), self.most)

    def rises_over(self, rows: range) -> bool:
        """True if the bound is not the same for all rows."""
        return self.at(rows.start) < self.at(rows.stop - 1)

    def turns(self, rows: range) -> Iterator[int]:
        """The rows at which the bound begins and ends to rise."""
        for limit in (self.least, self.most):
            yield min(max(limit - self.offset, rows.start), rows.stop)

    def sum_over(self, rows: range, keys: range) -> int:
        """The sum of the bounds of some rows, each within a range of keys."""
        least, most = (min(max(limit, keys.start), keys.stop) for limit in (self.least, self.most))
        low, high = (min(max(limit - self.offset, rows.start), rows.stop) for limit in (least, most))
        rising = (high - low) * (low + high - 1 + 2 * self.offset) // 2  # before them rows have the least, then the most
        return least * (low - rows.start) + rising + most * (rows.stop - high)

    def first_above(self, key: int, rows: range) -> int:
        """The first of some rows whose bound is above a key; the end of the rows where none is."""
        if self.most <= key:
            return rows.stop
        return rows.start if self.least > key else min(max(key + 1 - self.offset, rows.start), rows.stop)


class Document(NamedTuple):
    """Rows and keys of one document. Row i attends the keys [keys.start, stop_i) without [fixed, resume_i)."""

    rows: range
    keys: range
    stop: Ramp
    fixed: int
    resume: Ramp

    def pairs(self, rows: range, keys: range) -> int:
        """Pairs of some rows and keys of which the row attends the key."""
        rows = _common(rows, self.rows)
        if not rows:
            return 0
        start, fixed = (min(max(key, keys.start), keys.stop) for key in (self.keys.start, self.fixed))
        always = (fixed - start) * len(rows)
        return self.stop.sum_over(rows, keys) - self.resume.sum_over(rows, keys) + always

    def live_keys(self, rows: range, keys: range) -> list[range]:
        """The keys, of some, that any of some rows attends: ascending ranges."""
        rows = _common(rows, self.rows)
        if not rows:
            return []
        # Both ends of the rows' keys move on with them, and no key of the hole of the first row is attended by another.
        stop, resume = self.stop.at(rows[-1]), self.resume.at(rows[0])
        fixed = min(self.fixed, stop)
        parts = (range(self.keys.start, fixed), range(max(min(resume, stop), fixed), stop))
        return [part for part in (_common(part, keys) for part in parts) if part]

    def live_rows(self, rows: range, keys: range) -> range:
        """The rows, of some, that attend any of some keys."""
        rows, keys = _common(rows, self.rows), _common(keys, self.keys)
        if not rows or not keys:
            return range(0)
        first = self.stop.first_above(keys.start, rows)
        # A key before `fixed` is attended from some row on, for good.
        last = rows.stop if keys.start < self.fixed else self.resume.first_above(min(keys.stop, self.stop.most) - 1, rows)
        return range(first, last)


def _common(part: range, other: range) -> range:
    """What two ranges have in common, which may be nothing."""
    start = max(part.start, other.start)
    return range(start, max(start, min(part.stop, other.stop)))
