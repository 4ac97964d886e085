"""The mask: which keys a query row attends; everything else about a mask follows from that by arithmetic.

Rows and keys are divided into documents: one, or those of packed sequences. Within its document a row attends the keys up to
an end, but for those of a hole that a window has left behind:

    [start, stop) without [fixed, resume)      start <= fixed <= resume, and a hole that is not empty ends before `stop`

`start` and `fixed` are the same for all rows of a document; `stop` and `resume` rise by one key a row between two limits
(`Ramps`). A document of 8 causal rows with a window of two keys before each and one sink has start = 0, fixed = 1 and

    row      0  1  2  3  4  5  6  7
    stop     1  2  3  4  5  6  7  8        the row + 1, within 0 and 8
    resume   1  1  1  1  2  3  4  5        the row - 2, within 1 and 8

So a rectangle of rows and keys is judged by the documents at its corners, its pairs are a sum of closed forms, and nothing
of the size of the problem is made, only arrays of as many items as there are documents.

Sources: bottom-right alignment, windows and packed documents are those of FlashAttention's interface
(`flash_attn_varlen_func`). `verification` has a definition of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from oocattn.problem.bounds import Bounds, Int64s, Ramps, as_ranges, join_ranges, merge_ranges, span_of, without_hole
from oocattn.problem.document import Document, Ramp

_BLOCK = 1 << 15  # documents that are looked at together


class Cover(Enum):
    """The share of a rectangle of rows and keys that a mask covers."""

    DEAD = "dead"
    PARTIAL = "partial"
    FULL = "full"


@dataclass(frozen=True, eq=False)
class Mask:
    """The keys that each query row of one batch entry attends, among `keys`, which may be fewer than the arrays hold.

    Documents have the rows and keys between two `query_edges` and `key_edges`: int64 [documents + 1], ascending. The last
    row of a document is at its last key, and the rows before it are at the keys before that. With `causal` a row attends the
    keys up to its own, with `left` and `right` those from so many before it to so many after it (None: all). The first
    `prefix` keys are attended by all rows of a document, the first `sinks` are exempt from the window.
    """

    query_edges: Int64s
    key_edges: Int64s
    causal: bool = False
    left: int | None = None
    right: int | None = None
    prefix: int = 0
    sinks: int = 0

    @classmethod
    def of(cls, queries: int, keys: int, **options: Any) -> Mask:
        """The mask of one document of so many rows and keys."""
        return cls(np.array([0, queries]), np.array([0, keys]), **options)

    @property
    def queries(self) -> int:
        """Number of rows."""
        return int(self.query_edges[-1])

    @property
    def keys(self) -> int:
        """Number of keys."""
        return int(self.key_edges[-1])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.query_edges) - 1

    @property
    def is_full(self) -> bool:
        """True if every row attends every key."""
        return self.documents == 1 and not self.causal and self.left is None and self.right is None

    @property
    def is_triangular(self) -> bool:
        """True if there are as many rows as keys, and each attends the keys up to its own."""
        plain = self.causal and self.left is None and not self.prefix
        return plain and self.documents == 1 and self.queries == self.keys

    @property
    def is_simple(self) -> bool:
        """True if every row attends the keys from the first on: all, or up to its own."""
        return self.documents == 1 and self.left is None and not self.prefix and (self.causal or self.right is None)

    def __str__(self) -> str:
        words = ["causal" if self.causal else ""]
        if self.left is not None or (self.right is not None and not self.causal):
            left, right = ("all" if side is None else f"{side:,}" for side in (self.left, 0 if self.causal else self.right))
            words.append(f"window of {left} before and {right} after" if not self.causal else f"window of {left} before")
        for count, name in ((self.sinks, "sink"), (self.prefix, "prefix key")):
            words.append(f"{count:,} {name}{'s' * (count > 1)}" if count else "")
        words.append(f"{self.documents:,} documents" if self.documents > 1 else "")
        return ", ".join(filter(None, words)) or "full"

    def key_ranges(self, row: int) -> tuple[range, range]:
        """The keys that a row attends: the plain specification."""
        a, b, c, d = map(int, self.bounds(range(row, row + 1)).values()[0])
        return range(a, b), range(c, d)

    def bounds(self, rows: range, keys: range | None = None) -> Bounds:
        """What some rows attend of `keys` (default: all)."""
        found = self._of_documents(np.arange(*span_of(self.query_edges, rows))).part(rows)
        return found if keys is None else found.clipped(keys)

    def ledger(self, rows: range, keys: range | None = None) -> tuple[Int64s, Int64s]:
        """The number of `keys` (default: all) that each row attends, and the sum of their indices modulo 2^64."""
        return self.bounds(rows, keys).ledger()

    def pairs(self, rows: range | None = None, keys: range | None = None) -> int:
        """Pairs of `rows` and `keys` (default: all) of which the row attends the key."""
        rows = range(self.queries) if rows is None else rows
        keys = range(self.keys) if keys is None else keys
        first, last = self._documents_with(rows, keys)
        inner = self._pairs_of_documents(first + 1, last - 1)  # of which all rows and keys are in the rectangle
        return inner + sum(self._document(end).pairs(rows, keys) for end in _ends(first, last))

    def pairs_between(self, edges: Int64s) -> list[int]:
        """Pairs of the rows between each two of some ascending `edges`, and all keys."""
        document = np.minimum(np.searchsorted(self.query_edges, edges, "right"), self.documents) - 1
        before = self._pairs_before[document] + self._of_documents(document).pairs_before(edges)
        return cast(list[int], np.diff(before).tolist())

    def cover(self, rows: range, keys: range) -> Cover:
        """The share of a rectangle that is attended: all, some or none of its pairs."""
        pairs = self.pairs(rows, keys)
        if not pairs:
            return Cover.DEAD
        return Cover.FULL if pairs == len(rows) * len(keys) else Cover.PARTIAL

    def live_keys(self, rows: range, keys: range | None = None) -> list[range]:
        """The keys that any of `rows` attends: ascending ranges that do not touch."""
        keys = range(self.keys) if keys is None else keys
        first, last = self._documents_with(rows, keys)
        found = [part for end in _ends(first, last) for part in self._document(end).live_keys(rows, keys)]
        if first + 1 < last - 1:  # of documents in between, all rows and keys are in the rectangle
            inner = range(int(self.key_edges[first + 1]), int(self.key_edges[last - 1]))
            found += _within(self._live_keys_of_documents, inner)
        return join_ranges(found)

    def live_keys_between(self, edges: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """The keys that any row between each two of some ascending `edges` attends.

        Ranges of keys: the number of the part that attends each, first and last key, and one more. They may touch, and do
        not overlap.
        """
        low, high = edges[:-1], edges[1:]
        part = np.flatnonzero(low < high)
        low, high = low[part], high[part]
        first = np.searchsorted(self.query_edges, low, "right") - 1
        last = np.searchsorted(self.query_edges, high, "left") - 1
        two = first < last
        found = [
            (np.repeat(of, 2), *self._live_keys_of(document, start, stop))
            for of, document, start, stop in ((part, first, low, high), (part[two], last[two], low[two], high[two]))
        ]  # of the documents at the ends, which may be one; and of those in between, all of whose rows are there
        begin, end = self.key_edges[first + 1], self.key_edges[last]
        starts, stops = self._live_keys_of_documents
        one, beyond = np.searchsorted(stops, begin, "right"), np.searchsorted(starts, end, "left")
        counts = np.where(begin < end, np.maximum(beyond - one, 0), 0)
        of = np.repeat(np.arange(len(part)), counts)
        item = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts) + one[of]
        found.append((part[of], np.maximum(starts[item], begin[of]), np.minimum(stops[item], end[of])))
        owners, starts, stops = (np.concatenate(column) for column in zip(*found, strict=True))
        kept = starts < stops
        return owners[kept], starts[kept], stops[kept]

    def _live_keys_of(self, document: Int64s, low: Int64s, high: Int64s) -> tuple[Int64s, Int64s]:
        """First and last keys, two ranges each, that any of the rows from `low` to `high` of some documents attends."""
        found = self._of_documents(document)
        low, high = np.maximum(low, self.query_edges[document]), np.minimum(high, self.query_edges[document + 1])
        empty = low >= high
        stop, resume = found.stop.at(high - 1), found.resume.at(low)
        starts, stops = without_hole(found.start, stop, found.fixed, resume)
        return starts, np.where(np.repeat(empty, 2), starts, stops)

    @cached_property
    def _live_keys_of_documents(self) -> tuple[Int64s, Int64s]:
        """The keys that any row of their document attends: ascending ranges that do not touch."""
        found = [
            merge_ranges(*self._live_keys_of(block, self.query_edges[block], self.query_edges[block + 1]))
            for block in self._blocks()
        ]
        return merge_ranges(*(np.concatenate(edges) for edges in zip(*found, strict=True)))

    def live_rows(self, rows: range, keys: Iterable[range]) -> list[range]:
        """The rows that attend any of `keys`, ranges of them: ascending ranges that do not touch."""
        found: list[range] = []
        for part in filter(None, keys):
            first, last = self._documents_with(rows, part)
            found += [self._document(end).live_rows(rows, part) for end in _ends(first, last)]
            if first + 1 < last - 1:
                inner = range(int(self.query_edges[first + 1]), int(self.query_edges[last - 1]))
                found += _within(self._live_rows_of_documents, inner)
        return join_ranges(found)

    @cached_property
    def _live_rows_of_documents(self) -> tuple[Int64s, Int64s]:
        """The rows that attend any key: ascending ranges that do not touch."""
        found = []
        for block in self._blocks():
            bounds = self._of_documents(block)
            low, high = bounds.edges[:-1], bounds.edges[1:]
            # Rows before the first key of their document attend nothing, and those whose window has left its last key.
            first = np.where(
                bounds.stop.least > bounds.start, low, np.clip(bounds.start + 1 - bounds.stop.offset, low, high)
            )
            rises = np.clip(bounds.stop.most - bounds.resume.offset, low, high)
            last = np.where((bounds.start < bounds.fixed) | (bounds.resume.most < bounds.stop.most), high, rises)
            found.append(merge_ranges(first, np.where(bounds.start < bounds.stop.most, last, first)))
        return merge_ranges(*(np.concatenate(edges) for edges in zip(*found, strict=True)))

    def split(self, rows: range, keys: range) -> Iterator[tuple[range, Cover]]:
        """Cut `keys` into parts that `rows` attend in full or in part; dead parts are left out.

        Where no part would be full, what is live is not cut. A part that is full ends before the first row's own key, where
        rows are of one document: a causal part begins with that.
        """
        for live in self.live_keys(rows, keys):
            parts = [range(start, stop) for start, stop in pairwise(self._cuts(rows, live))]
            covers = [self.cover(rows, part) for part in parts]
            if Cover.FULL in covers:
                yield from zip(parts, covers, strict=True)
            else:
                yield live, Cover.PARTIAL

    def _cuts(self, rows: range, keys: range) -> list[int]:
        """Where what `rows` attend of `keys` changes from full to partial, and both ends."""
        cuts, (first, last) = {keys.start, keys.stop}, span_of(self.query_edges, rows)
        if last - first == 1:
            document = self._document(first)
            moves = document.stop.least < document.stop.most
            ends = (rows[0], rows[-1])
            inner = (document.stop.at(ends[0]) - moves, document.stop.at(ends[1]), *map(document.resume.at, ends))
            cuts.update(min(max(cut, keys.start), keys.stop) for cut in inner)
        return sorted(cuts)

    def _documents_with(self, rows: range, keys: range) -> tuple[int, int]:
        """The documents from the first to the last, and one more, that have any of `rows` and any of `keys`."""
        if self.documents == 1:
            return 0, 1
        by_rows, by_keys = span_of(self.query_edges, rows), span_of(self.key_edges, keys)
        return max(by_rows[0], by_keys[0]), min(by_rows[1], by_keys[1])

    def _document(self, index: int) -> Document:
        """One document."""
        if index not in self._documents:
            if len(self._documents) > _BLOCK:
                self._documents.clear()
            bounds = self._of_documents(np.array([index]))
            (rows,), (keys,) = (
                [range(int(edges[index]), int(edges[index + 1]))] for edges in (self.query_edges, self.key_edges)
            )
            stop, resume = (
                Ramp(*(int(numbers[0]) for numbers in (ramp.offset, ramp.least, ramp.most)))
                for ramp in (bounds.stop, bounds.resume)
            )
            self._documents[index] = Document(rows, keys, stop, int(bounds.fixed[0]), resume)
        return self._documents[index]

    @cached_property
    def _documents(self) -> dict[int, Document]:
        """Documents that were looked at."""
        return {}

    def _of_documents(self, document: Int64s) -> Bounds:
        """What all rows of some documents attend; its edges are their first rows, and the end of the last."""
        rows = self.query_edges[np.append(document, document[-1:] + 1 if len(document) else 0)]
        start, stop = self.key_edges[document], self.key_edges[document + 1]
        zero = np.zeros_like(start)
        position = stop - self.query_edges[document + 1]
        prefix, sinks = (np.minimum(count, stop - start) for count in (self.prefix, max(self.prefix, self.sinks)))
        fixed = start + sinks
        right = 0 if self.causal else self.right
        if right is None:
            end = Ramps(zero, stop, stop)
        else:
            end = Ramps(position + 1 + right, start + prefix if self.causal else fixed, stop)
        resume = Ramps(zero, fixed, fixed) if self.left is None else Ramps(position - self.left, fixed, stop)
        return Bounds(rows, start, end, fixed, resume, position)

    def _pairs_of_documents(self, first: int, last: int) -> int:
        """Pairs of all rows of some documents."""
        return int(self._pairs_before[last] - self._pairs_before[first]) if first < last else 0

    @cached_property
    def _pairs_before(self) -> npt.NDArray[Any]:
        """Pairs of all documents before each, and of all."""
        found = np.concatenate([self._of_documents(block).pairs() for block in self._blocks()])
        return np.concatenate([found[:1] * 0, np.cumsum(found)])

    def _blocks(self) -> Iterator[Int64s]:
        """All documents, some at a time: what is computed of them stays in a processor's cache."""
        starts = range(0, self.documents, _BLOCK)
        return (np.arange(start, min(start + _BLOCK, self.documents)) for start in starts)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what follows from them


def _ends(first: int, last: int) -> Iterable[int]:
    """The first and the last of some documents, which may be one."""
    return {first, last - 1} if first < last else ()


def _within(ranges: tuple[Int64s, Int64s], part: range) -> list[range]:
    """The parts of ascending ranges that lie in `part`."""
    starts, stops = ranges
    items = slice(np.searchsorted(stops, part.start, "right"), np.searchsorted(starts, part.stop, "left"))
    return as_ranges(np.maximum(starts[items], part.start), np.minimum(stops[items], part.stop))
