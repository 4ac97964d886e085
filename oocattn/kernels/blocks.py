"""Blocks: rows that are attended together, tile by tile of keys, and which keys of a tile they attend; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from oocattn.kernels.intervals import Int32s, Intervals
from oocattn.problem.bounds import hull, join_ranges


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a call, and the keys [a, b) and [c, d) that each of them attends: `bounds` [rows, 4]; None: all.

    `live` has the keys that any row attends, and perhaps some between documents; each of `whole`, keys that all rows attend.
    """

    rows: range
    bounds: Int32s | None
    live: list[range]
    whole: list[range]

    @classmethod
    def of(cls, rows: range, keys: int, bounds: Int32s | None) -> Block:
        """The block of some rows of a call of so many keys."""
        if bounds is None:
            return cls(rows, None, [range(keys)], [range(keys)])
        live, whole = [], []
        for start, stop in (bounds[:, :2].T, bounds[:, 2:].T):
            whole.append(range(int(start.max()), int(stop.min())))
            if (attends := start < stop).any():
                live.append(range(int(start[attends].min()), int(stop[attends].max())))
        return cls(rows, bounds, join_ranges(live), whole)

    def live_within(self, tile: range) -> list[range]:
        """The keys of a tile to attend."""
        return [part for run in self.live if (part := _common(run, tile))]

    def partial(self, keys: range) -> list[range]:
        """Those of some keys that not every row may attend: at either end."""
        if self.bounds is None:
            return []
        whole = max((_common(run, keys) for run in self.whole), key=len)
        ends = [range(keys.start, whole.start), range(whole.stop, keys.stop)] if whole else [keys]
        return [end for end in ends if end]

    def bounds_within(self, keys: range) -> Int32s:
        """The bounds [rows, 4] relative to the first of some keys."""
        if self.bounds is None:
            return np.array([[0, len(keys), 0, 0]], np.int32).repeat(len(self.rows), 0)
        return (self.bounds - np.int32(keys.start)).clip(0, len(keys))


def make_blocks(rows: int, intervals: Intervals | None, most: int, worth: int) -> list[range]:
    """Cut the rows of a call into blocks of at most so many.

    Rows of several documents share a block if that adds at most `worth` pairs, all of its rows with all of its keys.
    """
    found = list[tuple[range, range]]()
    for document, keys in [(range(rows), range(0))] if intervals is None else _documents(intervals):
        for row in document[::most]:
            part = range(row, min(row + most, document.stop))
            if found and row == document.start:
                both, of_both = hull([found[-1][0], part]), hull([found[-1][1], keys])
                apart = sum(len(some) * len(of_some) for some, of_some in (found[-1], (part, keys)))
                if len(both) <= most and len(both) * len(of_both) - apart <= worth:
                    found[-1] = both, of_both
                    continue
            found.append((part, keys))
    return [part for part, _ in found]


def _documents(intervals: Intervals) -> Iterable[tuple[range, range]]:
    """The rows of each document, and the keys from the first to the last that any of them attends."""
    bounds = intervals.bounds
    first = np.where(bounds.fixed > bounds.start, bounds.start, bounds.resume.at(bounds.edges[:-1]))
    stop = bounds.stop.at(bounds.edges[1:] - 1)
    numbers = (bounds.edges[:-1], bounds.edges[1:], first, np.maximum(first, stop))
    return ((range(a, b), range(c, d)) for a, b, c, d in zip(*(each.tolist() for each in numbers), strict=True))


def _common(left: range, right: range) -> range:
    """The numbers of both ranges."""
    return range(max(left.start, right.start), min(left.stop, right.stop))
