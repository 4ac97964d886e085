"""Strips: one query chunk against a run of neighbouring key chunks.

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

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from oocattn.division.base import Block, Subproblem, require_index, require_pair
from oocattn.units import ceil_div


@dataclass(frozen=True)
class Strips:
    """Subproblem (i, j) is query chunk i against key chunks j*span to (j+1)*span, causal those up to i. Implements Division.

    Indices count over j within i. Causal strips without a key do not exist.
    """

    chunks: int
    span: int
    triangular: bool

    def __post_init__(self) -> None:
        """Raise ValueError unless there is at least one chunk and one key chunk a strip."""
        if self.chunks < 1 or self.span < 1:
            raise ValueError(f"{self.chunks} chunks in strips of {self.span}: expected at least 1 of each")

    @property
    def subproblems(self) -> int:
        """Number of strips over all query chunks."""
        return self._first(self.chunks)

    def subproblem(self, index: int) -> Subproblem:
        """The one block of strip `index`."""
        require_index(index, self.subproblems, "subproblem")
        query_chunk, strip = self._place(index)
        end = query_chunk + 1 if self.triangular else self.chunks
        key_chunks = tuple(range(strip * self.span, min((strip + 1) * self.span, end)))
        others = tuple(key for key in key_chunks if key != query_chunk)
        block = Block(query_chunk, others, diagonal=len(others) < len(key_chunks))
        return Subproblem(index, (query_chunk,), key_chunks, (block,))

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """All strips of query chunk `chunk`."""
        require_index(chunk, self.chunks, "query chunk")
        return tuple(range(self._first(chunk), self._first(chunk + 1)))

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """The strip of `query_chunk` that spans `key_chunk`."""
        require_pair(self, query_chunk, key_chunk)
        return self._first(query_chunk) + key_chunk // self.span

    def chunk_reads(self) -> tuple[int, int]:
        """Every strip has one query chunk, and every pair is one read of keys."""
        return self.subproblems, self.chunks * (self.chunks + 1) // 2 if self.triangular else self.chunks**2

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """Deal lanes out back and forth from the last chunk, the longest: 0 1 2 2 1 0."""
        places = np.arange(self.chunks)[::-1] % (2 * lanes)
        return np.minimum(places, 2 * lanes - 1 - places)

    def _first(self, query_chunk: int) -> int:
        """Index of strip (query_chunk, 0), which is the number of strips before it."""
        if not self.triangular:
            return query_chunk * ceil_div(self.chunks, self.span)
        # Query chunks come in runs of `span`; each chunk of run n has n+1 strips.
        run, within = divmod(query_chunk, self.span)
        return self.span * run * (run + 1) // 2 + within * (run + 1)

    def _place(self, index: int) -> tuple[int, int]:
        """(i, j) of subproblem `index`."""
        if not self.triangular:
            return divmod(index, ceil_div(self.chunks, self.span))
        run = (isqrt(8 * (index // self.span) + 1) - 1) // 2  # the largest whose first index is not beyond
        within, strip = divmod(index - self._first(run * self.span), run + 1)
        return run * self.span + within, strip
