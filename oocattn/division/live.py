"""Live pairs: the chunk pairs of which any row attends any key. Divisions leave the others out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LivePairs:
    """The key chunks that each query chunk attends: ascending ranges of them that do not touch.

    Those of query chunk a are the items from first[a] up to first[a + 1] of `starts` and `stops`.
    """

    key_chunks: int
    first: Int64s  # [query chunks + 1]
    starts: Int64s
    stops: Int64s

    @classmethod
    def full(cls, query_chunks: int, key_chunks: int) -> LivePairs:
        """Every query chunk attends every key chunk."""
        zeros = np.zeros(query_chunks, np.int64)
        return cls(key_chunks, np.arange(query_chunks + 1), zeros, zeros + key_chunks)

    @classmethod
    def triangular(cls, chunks: int) -> LivePairs:
        """Every query chunk attends the key chunks up to its own."""
        every = np.arange(chunks + 1)
        return cls(chunks, every, np.zeros(chunks, np.int64), every[1:])

    @classmethod
    def of_ranges(cls, query_chunks: int, key_chunks: int, owners: Int64s, starts: Int64s, stops: Int64s) -> LivePairs:
        """Join ranges of key chunks, each of which the query chunk `owners` attends; they may touch and overlap."""
        apart = key_chunks + 1  # so the ranges of two query chunks never touch
        order = np.argsort(owners * apart + starts, kind="stable")
        low, high = (owners * apart + edges for edges in (starts, stops))
        low, high = low[order], np.maximum.accumulate(high[order])
        new, end = low[1:] > high[:-1], np.ones(len(low[:1]), bool)
        of, begin = np.divmod(low[np.concatenate([end, new])], apart)
        first = np.searchsorted(of, np.arange(query_chunks + 1))
        return cls(key_chunks, first, begin, high[np.concatenate([new, end])] - of * apart)

    @property
    def query_chunks(self) -> int:
        """Number of query chunks."""
        return len(self.first) - 1

    @cached_property
    def counts(self) -> Int64s:
        """The number of key chunks that each query chunk attends: [query chunks]."""
        before = np.concatenate([[0], np.cumsum(self.stops - self.starts)])
        return cast(Int64s, before[self.first[1:]] - before[self.first[:-1]])

    @cached_property
    def is_full(self) -> bool:
        """True if every pair is live."""
        return bool((self.counts == self.key_chunks).all())

    @cached_property
    def is_triangular(self) -> bool:
        """True if the pairs up to the diagonal are live, and no others."""
        chunks = self.query_chunks
        one_each = chunks == self.key_chunks and len(self.starts) == chunks
        return one_each and not self.starts.any() and bool((self.stops == np.arange(1, chunks + 1)).all())

    def ranges(self, query_chunk: int) -> list[range]:
        """The key chunks that a query chunk attends."""
        items = slice(self.first[query_chunk], self.first[query_chunk + 1])
        return [range(a, b) for a, b in zip(self.starts[items].tolist(), self.stops[items].tolist(), strict=True)]

    def keys(self, query_chunk: int) -> list[int]:
        """The key chunks that a query chunk attends, ascending."""
        return [key for part in self.ranges(query_chunk) for key in part]

    def has(self, query_chunk: int, key_chunk: int) -> bool:
        """True if a pair is live."""
        return any(key_chunk in part for part in self.ranges(query_chunk))

    def are_live(self, query_chunks: Int64s, key_chunks: Int64s) -> npt.NDArray[np.bool_]:
        """Which of these pairs are live: of each query chunk and key chunk one bool."""
        apart = self.key_chunks + 1
        owners = np.repeat(np.arange(self.query_chunks), np.diff(self.first))
        places = query_chunks * apart + key_chunks
        last = np.searchsorted(owners * apart + self.starts, places, "right") - 1  # the range that begins last before each
        stops = np.concatenate([owners * apart + self.stops, [0]])  # the 0 is before all: no range begins there
        return places < stops[last]

    def matrix(self) -> npt.NDArray[np.bool_]:
        """Which pairs are live: [query chunks, key chunks]."""
        steps = np.zeros((self.query_chunks, self.key_chunks + 1), np.int8)
        of = np.repeat(np.arange(self.query_chunks), np.diff(self.first))
        np.add.at(steps, (of, self.starts), 1)
        np.add.at(steps, (of, self.stops), -1)
        return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8) > 0
