"""The keys that rows attend: the mask, defined a second time on purpose.

Nothing of `problem.mask` is used here, so that a fault there shows. Each row is looked at by itself: its document, its
position p among the document's keys, and the conditions that a key meets. A new mask is a case in `attended_ranges`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem

Int64s = npt.NDArray[np.int64]

ROWS_AT_A_TIME = 1 << 16  # whose ranges are made together, where those of all rows are counted


@dataclass(frozen=True)
class _Documents:
    """The documents that some rows are in: their first key, their number of keys, and each row's position.

    All are [rows], the first two [] where there is but one document. Positions are counted from the document's first key.
    The last row of a document is at its last key.
    """

    first_key: Int64s
    keys: Int64s
    position: Int64s


def attended_ranges(problem: Problem, batch: int, tokens: Int64s) -> Int64s:
    """The ranges [first, last) of keys that the query rows `tokens` of a batch entry attend: int64 [rows, 2, 2].

    Ranges of a row are ascending and do not overlap. Empty ones have first = last.
    """
    found = _documents_of(problem, batch, tokens)
    position, keys = found.position, found.keys
    farthest = problem.queries + problem.keys  # no key lies farther from a row
    left, right = (None if side is None else min(side, farthest) for side in problem.window_size)
    after = 0 if problem.causal else right
    exempt: Int64s | int = min(problem.sink_tokens, problem.keys)
    if problem.causal and exempt:
        exempt = np.minimum(exempt, position + 1)
    head_stop = _within(np.maximum(exempt, min(problem.prefix, problem.keys)), 0, keys)  # with the prefix: of all rows
    band_start = _within(0 if left is None else position - left, head_stop, keys)
    band_stop = _within(keys if after is None else position + (1 + after), band_start, keys)
    ranges = np.empty((len(tokens), 2, 2), np.int64)
    ranges[:, 0, 0] = found.first_key
    ranges[:, 0, 1] = found.first_key + head_stop
    ranges[:, 1, 0] = found.first_key + band_start
    ranges[:, 1, 1] = found.first_key + band_stop
    return ranges


def _within(numbers: Int64s | int, least: Int64s | int, most: Int64s | int) -> Int64s:
    found: Int64s = np.minimum(np.maximum(numbers, least), most)
    return found


def count_keys(ranges: Int64s) -> Int64s:
    """The keys in the ranges [rows, 2, 2] of each row: [rows]."""
    lengths = ranges[..., 1] - ranges[..., 0]
    found: Int64s = lengths[:, 0] + lengths[:, 1]
    return found


def key_positions(problem: Problem, batch: int, tokens: Int64s) -> Int64s:
    """The key at which each of the query rows `tokens` is, which may lie outside its document: int64 [rows]."""
    found = _documents_of(problem, batch, tokens)
    return found.first_key + found.position


def count_attended(problem: Problem) -> tuple[int, int]:
    """The pairs that are to be attended, and the rows of `out` without a key, over all heads; each row is looked at."""
    used = problem.given.seqused_k
    entries = {0: problem.batch} if used is None else {}
    if used is not None:
        _, firsts, counts = np.unique(used, return_index=True, return_counts=True)
        entries = dict(zip(firsts.tolist(), counts.tolist(), strict=True))  # those with equally many keys are alike
    pairs = without = 0
    for batch, alike in entries.items():
        for first in range(*problem.rows_asked, ROWS_AT_A_TIME):
            tokens = np.arange(first, min(first + ROWS_AT_A_TIME, problem.rows_asked[1]))
            lengths = np.diff(attended_ranges(problem, batch, tokens)).sum(axis=(1, 2))
            pairs += alike * int(lengths.sum())
            without += alike * int((lengths == 0).sum())
    return pairs * problem.out_heads, without * problem.out_heads


def _documents_of(problem: Problem, batch: int, tokens: Int64s) -> _Documents:
    """The documents of the query rows `tokens` of a batch entry."""
    given = problem.given
    keys = problem.keys if given.seqused_k is None else int(given.seqused_k[batch])
    if given.cu_seqlens_q is None:
        return _Documents(np.asarray(0), np.asarray(keys), tokens + (keys - problem.queries))
    query_edges = given.cu_seqlens_q
    key_edges = query_edges if given.cu_seqlens_k is None else given.cu_seqlens_k
    document = np.searchsorted(query_edges, tokens, side="right") - 1  # the last one that begins there: not an empty one
    rows_left = query_edges[document + 1] - tokens
    in_document = key_edges[document + 1] - key_edges[document]
    return _Documents(key_edges[document], in_document, in_document - rows_left)


class AttendedKeys:
    """The keys that some rows attend, given by ranges [rows, ranges, 2]."""

    def __init__(self, ranges: Int64s) -> None:
        self._ranges = ranges

    @cached_property
    def spans(self) -> list[range]:
        """The keys that any row attends: ascending ranges that do not touch."""
        used = self._ranges[self._ranges[..., 0] < self._ranges[..., 1]]
        if not len(used):
            return []
        used = used[np.argsort(used[:, 0], kind="stable")]
        reached = np.maximum.accumulate(used[:, 1])
        gaps = np.flatnonzero(used[1:, 0] > reached[:-1]) + 1
        starts, stops = used[[0, *gaps], 0].tolist(), reached[[*(gaps - 1), -1]].tolist()
        return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]

    @property
    def keys(self) -> int:
        """The number of keys that any row attends."""
        return sum(map(len, self.spans))

    @property
    def pairs(self) -> int:
        """The keys that the rows attend, one by one."""
        return int((self._ranges[..., 1] - self._ranges[..., 0]).sum())

    def tiles(self, keys: int) -> Iterator[tuple[int, int]]:
        """The first key of each tile of `spans`, and one past the last, at most so many `keys`."""
        for span in self.spans:
            for start in span[::keys]:
                yield start, min(start + keys, span.stop)

    def count(self, start: int, stop: int) -> Int64s:
        """The keys of [start, stop) that each row attends: [rows]."""
        clipped = self._ranges.clip(start, stop)
        counts: Int64s = (clipped[..., 1] - clipped[..., 0]).sum(axis=1)
        return counts

    def hidden(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which keys of [start, stop) each row does not attend: [rows, n]; None where all rows attend all of them."""
        if (self.count(start, stop) == stop - start).all():
            return None
        keys = np.arange(start, stop)
        hidden = np.ones((len(self._ranges), len(keys)), bool)
        for first, last in self._ranges.transpose(1, 2, 0)[..., np.newaxis]:  # each [rows, 1]
            hidden &= (keys < first) | (keys >= last)
        return hidden


def groups_of(ranges: Int64s, most: int) -> Iterator[slice]:
    """Cut rows, given by their ranges, into runs of at most `most` that attend at least a quarter of what any attends."""
    first = 0
    for stop in range(1, len(ranges) + 1):
        if stop < len(ranges) and stop - first < most:
            keys = AttendedKeys(ranges[first : stop + 1])
            if (stop + 1 - first) * keys.keys <= 4 * keys.pairs:
                continue
        yield slice(first, stop)
        first = stop
