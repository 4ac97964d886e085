"""The mask: which keys a query row attends; everything else about a mask follows from that by arithmetic.

A row attends two ranges of keys at most, [a, b) and [c, d) with b <= c. Each bound is a `Ramp` of the row: it rises by one
key a row between two limits. So a rectangle of rows and keys is judged by its corners, its pairs are a sum of closed forms,
and nothing of the size of the problem is made.
A causal row of 6, as an example, attends [0, b):

    row     0  1  2  3  4  5
    b       1  2  3  4  5  6        Ramp(offset=1, least=0, most=6)

A new mask is a class with four ramps, and a line in `make_mask`. `verification` has a definition of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

Rows = TypeVar("Rows", int, npt.NDArray[np.float64])  # one row exactly, or many to the accuracy of float64

Int64s = npt.NDArray[np.int64]


class Cover(Enum):
    """The share of a rectangle of rows and keys that a mask covers."""

    DEAD = "dead"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True)
class Ramp:
    """A bound that rises with the row: row + offset, between `least` and `most`."""

    offset: int
    least: int
    most: int

    @classmethod
    def constant(cls, value: int) -> Ramp:
        """The same bound for every row."""
        return cls(0, value, value)

    @property
    def moves(self) -> bool:
        """True if the bound is not the same for every row."""
        return self.least < self.most

    def at(self, row: int) -> int:
        """The bound of one row."""
        return int(_clip(row + self.offset, self.least, self.most))

    def values(self, rows: range) -> Int64s:
        """The bounds of consecutive rows: int64 [n], or [] where all are the same."""
        if not self.moves:
            return np.asarray(self.least, np.int64)
        values = np.arange(rows.start + self.offset, rows.stop + self.offset, dtype=np.int64)
        return np.clip(values, self.least, self.most, out=values)

    def clipped(self, keys: range) -> Ramp:
        """The same bound within a range of keys."""
        return Ramp(self.offset, _clip(self.least, keys.start, keys.stop), _clip(self.most, keys.start, keys.stop))

    def before(self, row: Rows) -> Rows:
        """The sum of the bounds of all rows before `row`."""
        low = _clip(self.least - self.offset, 0, row)  # rows before it have the least bound
        high = _clip(self.most - self.offset, 0, row)  # rows from it on have the most
        between = (high - low) * (low + high - 1 + 2 * self.offset) // 2
        return cast(Rows, self.least * low + between + self.most * (row - high))

    def first_above(self, key: int, rows: range) -> int:
        """The first of `rows` whose bound is above `key`; the end of `rows` where none is."""
        if self.most <= key:
            return rows.stop
        return rows.start if self.least > key else _clip(key + 1 - self.offset, rows.start, rows.stop)


@dataclass(frozen=True)
class Mask(ABC):
    """The keys, of `keys`, that each of `queries` rows attends, of one batch entry (see `entry`)."""

    queries: int
    keys: int

    @property
    @abstractmethod
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        """The bounds a <= b <= c <= d of a row's two ranges, 0 to the number of keys."""

    @property
    def triangular(self) -> bool:
        """True if rows attend the keys up to their own: chunks those before them, and of themselves the lower triangle."""
        return False

    @abstractmethod
    def __str__(self) -> str:
        """The mask in a word or two."""

    def entry(self, batch: int) -> Mask:
        """The mask of one batch entry; the problem's own is the union of them."""
        return self

    def key_ranges(self, row: int) -> tuple[range, range]:
        """The keys that a row attends: the plain specification."""
        a, b, c, d = (ramp.at(row) for ramp in self.ramps)
        return range(a, b), range(c, d)

    def counts(self, rows: range, keys: range | None = None) -> Int64s:
        """The number of `keys` (default: all) that each row attends: int64 [n]."""
        a, b, c, d = (ramp.values(rows) for ramp in self._ramps(keys))
        return np.broadcast_to((b - a) + (d - c), len(rows))

    def index_sums(self, rows: range, keys: range | None = None) -> Int64s:
        """The sum of the indices of these keys, of each row: int64 [n], modulo 2^64."""
        a, b, c, d = (ramp.values(rows) for ramp in self._ramps(keys))
        return np.broadcast_to(_index_sums(a, b) + _index_sums(c, d), len(rows))

    def pairs(self, rows: range | None = None, keys: range | None = None) -> int:
        """Pairs of `rows` and `keys` (default: all) of which the row attends the key."""
        rows = range(self.queries) if rows is None else rows
        a, b, c, d = (ramp.before(rows.stop) - ramp.before(rows.start) for ramp in self._ramps(keys))
        return (b - a) + (d - c) if rows else 0

    def pairs_before(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Pairs of all rows before each of `rows`, to the accuracy of float64: [m]."""
        a, b, c, d = (ramp.before(rows) for ramp in self.ramps)
        return (b - a) + (d - c)

    def cover(self, rows: range, keys: range) -> Cover:
        """The share of a rectangle that is attended: all, some or none of its pairs."""
        pairs = self.pairs(rows, keys)
        if not pairs:
            return Cover.DEAD
        return Cover.FULL if pairs == len(rows) * len(keys) else Cover.PARTIAL

    def live_rows(self, rows: range, keys: range) -> range:
        """The rows from the first to the last that attend any of `keys`."""
        a, b, c, d = self.ramps
        spans = [
            range(high.first_above(keys.start, rows), low.first_above(keys.stop - 1, rows))
            for low, high in ((a, b), (c, d))
            if self._overlap(low, high, rows, keys)
        ]
        return range(min(span.start for span in spans), max(span.stop for span in spans)) if spans else rows[:0]

    def split(self, rows: range, keys: range) -> Iterator[tuple[range, Cover]]:
        """Cut `keys` into parts that `rows` attend in full or in part; dead parts are left out.

        The last key that all rows attend counts to the ones after it: a causal part begins with its first row's own key.
        """
        if not rows:
            return
        cuts = {keys.start, keys.stop}
        for number, ramp in enumerate(self.ramps):
            first = ramp.at(rows[0]) - (number % 2 and ramp.moves)
            cuts.update(_clip(cut, keys.start, keys.stop) for cut in (first, ramp.at(rows[-1])))
        edges = sorted(cuts)
        for start, stop in pairwise(edges):
            part = range(start, stop)
            if (cover := self.cover(rows, part)) is not Cover.DEAD:
                yield part, cover

    def _ramps(self, keys: range | None) -> tuple[Ramp, ...]:
        return self.ramps if keys is None else tuple(ramp.clipped(keys) for ramp in self.ramps)

    @staticmethod
    def _overlap(low: Ramp, high: Ramp, rows: range, keys: range) -> bool:
        low, high = low.clipped(keys), high.clipped(keys)
        sums = (ramp.before(rows.stop) - ramp.before(rows.start) for ramp in (low, high))
        return next(sums) < next(sums)


@dataclass(frozen=True)
class Full(Mask):
    """Every row attends every key."""

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        """[0, keys)."""
        return Ramp.constant(0), *[Ramp.constant(self.keys)] * 3  # type: ignore[return-value]

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Causal(Mask):
    """Every row attends the keys up to its own position, i + keys - queries for row i: so the last one attends all."""

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        """[0, i + 1 + keys - queries)."""
        end = Ramp.constant(self.keys)
        return Ramp.constant(0), Ramp(1 + self.keys - self.queries, 0, self.keys), end, end

    @property
    def triangular(self) -> bool:
        """True where there are as many rows as keys."""
        return self.queries == self.keys

    def __str__(self) -> str:
        return "causal"


def make_mask(queries: int, keys: int, *, causal: bool) -> Mask:
    """The mask that a problem's options name; a new one is registered here."""
    return Causal(queries, keys) if causal else Full(queries, keys)


def _clip(value: Any, least: Any, most: Any) -> Any:
    """`value`, but at least `least` and at most `most`, any of which may be an array."""
    if isinstance(most, np.ndarray):
        return np.clip(value, least, most)
    return min(max(value, least), most)


def _index_sums(start: Int64s, stop: Int64s) -> Int64s:
    """Sums of the whole numbers [start, stop) modulo 2^64."""
    count, ends = stop - start, start + stop - 1  # a sum is half their product, and one of them is even
    odd = count % 2
    return cast(Int64s, np.where(odd, count, count // 2) * np.where(odd, ends // 2, ends))
