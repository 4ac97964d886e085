"""Bounds of the keys that rows attend, as arrays: an item for each piece of rows, and what follows from them row by row.

`mask` says where they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

LARGEST = 1 << 30
"""Rows and keys up to which sums over all pairs fit 64 bits; of more, Python's own integers are summed."""


@dataclass(frozen=True, eq=False)
class Ramps:
    """A bound of rows that rises with them, for each of several documents: row + offset, between `least` and `most`."""

    offset: Int64s
    least: Int64s
    most: Int64s

    def at(self, row: Int64s) -> Int64s:
        """The bound of one row of each document, or of a row for each of theirs."""
        return cast(Int64s, _clip(row + self.offset, self.least, self.most))

    def before(self, row: Int64s) -> Int64s:
        """The sum of the bounds of all rows from 0 to before `row`, of each document."""
        low = _clip(self.least - self.offset, 0, row)  # rows before it have the least bound
        high = _clip(self.most - self.offset, 0, row)  # rows from it on have the most
        between = (high - low) * (low + high - 1 + 2 * self.offset) // 2
        return cast(Int64s, self.least * low + between + self.most * (row - high))

    def clipped(self, keys: range) -> Ramps:
        """The same bounds within a range of keys."""
        least, most = (_clip(limit, keys.start, keys.stop) for limit in (self.least, self.most))
        return Ramps(self.offset, least, most)

    def moved(self, rows: int, keys: int) -> Ramps:
        """The same bounds where rows are counted from `rows`, and keys from `keys`."""
        return Ramps(self.offset + rows - keys, self.least - keys, self.most - keys)

    def __getitem__(self, items: Any) -> Ramps:
        return Ramps(self.offset[items], self.least[items], self.most[items])


@dataclass(frozen=True, eq=False)
class Bounds:
    """The keys that some consecutive rows attend, a piece for each document that has any of the rows.

    Piece k has the rows from edges[k] up to edges[k + 1]. They attend [start, stop) without [fixed, resume); row i is at key
    i + position of its document's keys, where it is aligned with them.
    """

    edges: Int64s  # [pieces + 1]
    start: Int64s  # [pieces], as all that follows
    stop: Ramps
    fixed: Int64s
    resume: Ramps
    position: Int64s

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.edges[-1] - self.edges[0])

    @cached_property
    def table(self) -> Int64s:
        """All numbers of the pieces that have rows: int64 [pieces, 10].

        End of the rows, start; offset, least and most of `stop`; fixed; those of `resume`; position.
        """
        columns = (self.edges[1:], self.start, self.stop.offset, self.stop.least, self.stop.most, self.fixed)
        others = (self.resume.offset, self.resume.least, self.resume.most, self.position)
        return np.stack((*columns, *others), 1)[self.edges[1:] > self.edges[:-1]]

    def clipped(self, keys: range) -> Bounds:
        """The part of `keys` that the rows attend."""
        start, fixed = (_clip(bound, keys.start, keys.stop) for bound in (self.start, self.fixed))
        return Bounds(self.edges, start, self.stop.clipped(keys), fixed, self.resume.clipped(keys), self.position)

    def moved(self, rows: int, keys: int) -> Bounds:
        """The same where rows are counted from `rows`, and keys from `keys`."""
        ramps = (ramp.moved(rows, keys) for ramp in (self.stop, self.resume))
        stop, resume = ramps
        return Bounds(self.edges - rows, self.start - keys, stop, self.fixed - keys, resume, self.position + rows - keys)

    def without_others(self, kept: Sequence[range]) -> Bounds:
        """The same where only the keys of some ascending ranges are counted; no row attends another between them.

        Each bound of a piece moves within one range, for between two no key is attended.
        """
        starts, lengths = (np.array([numbers(part) for part in kept]) for numbers in (lambda part: part.start, len))
        shifts = starts - (np.cumsum(lengths) - lengths)  # of the keys of each range

        def place(key: Int64s) -> Int64s:
            at = np.maximum(np.searchsorted(starts, key, "right") - 1, 0)
            return cast(Int64s, np.clip(key, starts[at], starts[at] + lengths[at]) - shifts[at])

        def moved(ramp: Ramps, key: Int64s) -> tuple[Ramps, Int64s]:
            """A ramp with its shift: that of the range which has a key."""
            shift = shifts[np.maximum(np.searchsorted(starts, key, "right") - 1, 0)]
            return Ramps(ramp.offset - shift, place(ramp.least), place(ramp.most)), shift

        stop, shift = moved(self.stop, self.stop.at(self.edges[1:] - 1) - 1)
        resume, _ = moved(self.resume, self.resume.at(self.edges[:-1]))
        return Bounds(self.edges, place(self.start), stop, place(self.fixed), resume, self.position - shift)

    def part(self, rows: range) -> Bounds:
        """The pieces of some of the rows."""
        first, last = span_of(self.edges, rows)
        edges = _clip(self.edges[first : last + 1], rows.start, rows.stop)
        pieces = slice(first, last)
        return Bounds(
            edges, self.start[pieces], self.stop[pieces], self.fixed[pieces], self.resume[pieces], self.position[pieces]
        )

    def values(self) -> npt.NDArray[np.int64]:
        """Keys [a, b) and [c, d) of every row, ascending: int64 [rows, 4]."""
        found = np.empty((self.rows, 4), np.int64)
        stop = self._of_rows(self.stop)
        fixed = np.minimum(self._of_rows(self.fixed), stop)
        found[:, 0], found[:, 1], found[:, 3] = self._of_rows(self.start), fixed, stop
        found[:, 2] = np.maximum(np.minimum(self._of_rows(self.resume), stop), fixed)
        return found

    def ledger(self) -> tuple[Int64s, Int64s]:
        """The number of keys that each row attends, and the sum of their indices modulo 2^64: int64 [rows] both."""
        stop, resume = self._of_rows(self.stop), self._of_rows(self.resume)
        start, fixed = self._of_rows(self.start), self._of_rows(self.fixed)
        counts = stop - resume + (fixed - start)
        sums = sums_before(stop) - sums_before(resume) + (sums_before(fixed) - sums_before(start))
        return np.broadcast_to(counts, self.rows), np.broadcast_to(sums, self.rows)

    def _of_rows(self, bound: Int64s | Ramps) -> Int64s:
        """A bound of every row: [rows], or [1] where all are the same."""
        lengths = np.diff(self.edges)

        def of_rows(numbers: Int64s) -> Int64s:
            return np.repeat(numbers, lengths) if len(lengths) > 1 else numbers

        if not isinstance(bound, Ramps):
            return of_rows(bound)
        if not (bound.least < bound.most).any():
            return of_rows(bound.most)
        found = np.arange(self.edges[0], self.edges[-1], dtype=np.int64)
        found += of_rows(bound.offset)
        np.maximum(found, of_rows(bound.least), out=found)
        return np.minimum(found, of_rows(bound.most), out=found)

    def positions(self) -> Int64s:
        """The key at which each row is: int64 [rows]."""
        row = np.arange(self.edges[0], self.edges[-1], dtype=np.int64)
        return cast(Int64s, row + np.repeat(self.position, np.diff(self.edges)))

    def live_keys(self) -> list[range]:
        """The keys that any of the rows attends: ascending ranges that do not touch."""
        # Both ends of a piece's rows move on with them, and no key of the hole of its first row is attended by another.
        stop, resume = self.stop.at(self.edges[1:] - 1), self.resume.at(self.edges[:-1])
        kept = np.repeat(self.edges[1:] > self.edges[:-1], 2)
        starts, stops = without_hole(self.start, stop, self.fixed, resume)
        return as_ranges(*merge_ranges(starts[kept], stops[kept]))

    def pairs(self) -> npt.NDArray[Any]:
        """The keys that all rows of a piece attend together: int64 [pieces], or Python's integers where they may be many."""
        return self.pairs_before(self.edges[1:])

    def pairs_before(self, row: Int64s) -> npt.NDArray[Any]:
        """The same of the rows of each piece before a row of its own: [pieces]."""
        largest = max(int(abs(numbers).max(initial=0)) for numbers in (self.edges, self.stop.most, self.stop.offset))
        first, row = (rows.astype(np.int64 if largest <= LARGEST else object) for rows in (self.edges[:-1], row))
        return cast(npt.NDArray[Any], self._pairs_before(row) - self._pairs_before(first))

    def _pairs_before(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        always = row * (self.fixed - self.start)
        return cast(npt.NDArray[Any], self.stop.before(row) - self.resume.before(row) + always)


def span_of(edges: Int64s, part: range) -> tuple[int, int]:
    """The items, between two edges each, from the first to the last that have any of `part`."""
    last = min(int(np.searchsorted(edges, part.stop, "left")), len(edges) - 1)
    return min(max(0, int(np.searchsorted(edges, part.start, "right")) - 1), last), last


def _clip(value: Any, least: Any, most: Any) -> Any:
    """`value`, but at least `least` and at most `most`, any of which may be an array."""
    found = np.maximum(value, least)
    return found if most is None else np.minimum(found, most)


def without_hole(start: Int64s, stop: Int64s, fixed: Int64s, resume: Int64s) -> tuple[Int64s, Int64s]:
    """First and last items of [start, stop) without [fixed, resume): two ranges for each, that may be empty."""
    first = np.minimum(fixed, stop)
    second = np.maximum(np.minimum(resume, stop), first)
    return np.stack([start, second], 1).ravel(), np.stack([first, stop], 1).ravel()


def merge_ranges(starts: Int64s, stops: Int64s) -> tuple[Int64s, Int64s]:
    """Join ranges that touch or overlap; empty ones are left out."""
    kept = starts < stops
    # Nothing covers the gap before the next start if as many ranges have ended as have started: no range is followed.
    starts, stops = np.sort(starts[kept]), np.sort(stops[kept])
    apart, end = starts[1:] > stops[:-1], np.ones(len(starts[:1]), bool)
    return starts[np.concatenate([end, apart])], stops[np.concatenate([apart, end])]


def as_ranges(starts: Int64s, stops: Int64s) -> list[range]:
    """Ranges as Python's own."""
    return [range(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def hull(parts: Sequence[range]) -> range:
    """All from the first to the last of some ascending ranges."""
    return range(parts[0].start, parts[-1].stop)


def join_ranges(parts: Iterable[range]) -> list[range]:
    """Join ranges that touch or overlap; empty ones are left out."""
    found: list[range] = []
    for part in sorted(filter(None, parts), key=lambda part: part.start):
        if found and part.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, part.stop))
        else:
            found.append(part)
    return found


def sums_before(stop: Int64s) -> Int64s:
    """Sums of the whole numbers before some, modulo 2^64: half of a product of two neighbours, one of which is even."""
    if not len(stop) or int(stop.max()) <= LARGEST:
        return cast(Int64s, stop * (stop - 1) >> 1)
    odd = stop & 1
    return cast(Int64s, np.where(odd, stop, stop >> 1) * np.where(odd, (stop - 1) >> 1, stop - 1))
