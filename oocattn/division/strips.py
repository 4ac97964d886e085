"""Strips: one query chunk against some neighbouring key chunks that it attends.

With c = 7 and span = 3, the owner of each causal pair (query chunks down, key chunks across):

       0 1 2 3 4 5 6
    0  0
    1  1 1
    2  2 2 2
    3  3 3 3 4
    4  5 5 5 6 6
    5  7 7 7 8 8 8
    6  9 9 9 . . . :    subproblems 9, 10 (.) and 11 (:)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from oocattn.division.base import Block, Subproblem, require_index, require_pair
from oocattn.division.live import LivePairs


@dataclass(frozen=True, eq=False)
class Strips:
    """Subproblem (i, j) is query chunk i against the j-th `span` of the key chunks that it attends. Implements Division.

    Indices count over j within i.
    """

    live: LivePairs
    span: int

    def __post_init__(self) -> None:
        """Raise ValueError unless a strip has at least one key chunk."""
        if self.span < 1:
            raise ValueError(f"strips of {self.span} key chunks: expected at least 1")

    @property
    def indices(self) -> Sequence[int]:
        """All strips of all query chunks."""
        return range(int(self._first[-1]))

    def subproblem(self, index: int) -> Subproblem:
        """The one block of strip `index`."""
        query_chunk, keys = self._strip(index)
        return Subproblem.of(index, [Block(query_chunk, tuple(keys))])

    def pairs(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Those of strip `index`."""
        query_chunk, keys = self._strip(index)
        return np.full(len(keys), query_chunk, np.int64), np.asarray(keys, np.int64)

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """All strips of query chunk `chunk`."""
        require_index(chunk, self.live.query_chunks, "query chunk")
        return tuple(range(int(self._first[chunk]), int(self._first[chunk + 1])))

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """The strip of `query_chunk` that spans `key_chunk`."""
        require_pair(self.live, query_chunk, key_chunk)
        return int(self._first[query_chunk]) + self.live.keys(query_chunk).index(key_chunk) // self.span

    def chunk_reads(self) -> tuple[int, int]:
        """Every strip has one query chunk, and every pair is one read of keys."""
        return len(self.indices), int(self.live.counts.sum())

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """Deal lanes out back and forth from the last chunk, the longest of causal ones: 0 1 2 2 1 0."""
        places = np.arange(self.live.query_chunks)[::-1] % (2 * lanes)
        return np.minimum(places, 2 * lanes - 1 - places)

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """The first strip of each query chunk, and the end."""
        return np.concatenate([[0], np.cumsum(-(-self.live.counts // self.span))])

    def _strip(self, index: int) -> tuple[int, list[int]]:
        """The query chunk of strip `index`, and its key chunks."""
        require_index(index, len(self.indices), "subproblem")
        query_chunk = int(np.searchsorted(self._first, index, "right")) - 1
        start = (index - int(self._first[query_chunk])) * self.span
        return query_chunk, self._keys(query_chunk, start, start + self.span)

    def _keys(self, query_chunk: int, start: int, stop: int) -> list[int]:
        """Some of the key chunks that a query chunk attends, counted from the first."""
        found: list[int] = []
        for part in self.live.ranges(query_chunk):
            found += part[max(0, start) : max(0, stop)]
            start, stop = start - len(part), stop - len(part)
        return found
