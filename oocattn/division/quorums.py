"""Cyclic quorums: the subproblem that owns each chunk pair. Difference sets are made in `difference_sets.py`.

**The idea.** Attention over c chunks is c^2 pairs (query chunk, key chunk), each to be computed exactly once. Take
a set S of k residues modulo c in which every non-zero residue is a difference exactly once; for c = 7, S = {0, 1, 5}:

    1 = 1-0    2 = 0-5    3 = 1-5    4 = 5-1    5 = 5-0    6 = 0-1    (mod 7)

Quorum i is S moved by i. Chunks a and b lie together in quorum i when a = i+x and b = i+y with x and y in S, so that
y - x = b - a (mod c). Only one pair (x, y) makes that difference, so only one quorum, i = a - x, holds both chunks; it
owns (a, b) and (b, a). Chunk a with itself lies in k quorums; quorum a owns that diagonal pair, 0 being in S.

        quorum 0  0 1 5                           key chunk
        quorum 1  1 2 6                        0 1 2 3 4 5 6
        quorum 2  2 3 0                     0  0 0 2 2 6 0 6
        quorum 3  3 4 1                     1  0 1 1 3 3 0 1
        quorum 4  4 5 2        query        2  2 1 2 2 4 4 1
        quorum 5  5 6 3        chunk        3  2 3 2 3 3 5 5
        quorum 6  6 0 4                     4  6 3 4 3 4 4 6
                                            5  0 0 4 5 4 5 5
                                            6  6 1 1 5 6 5 6

Quorum 0 computes rows 0, 1 and 5 against columns 0, 1 and 5, less two diagonal pairs: it reads k chunks for c pairs,
and needs no other subproblem's result. Causal attention keeps the lower triangle: of the two orders of a pair, the one
with the lower key chunk. That leaves k(k-1)/2 full pairs and a diagonal in *every* quorum: level without scheduling.

**Where no perfect set exists** S is a difference cover: some difference is made more than once, and one maker is chosen
to represent it, reversed for the opposite difference. All of the above holds but for d = c/2 with even c, which is its
own opposite: there (a, b) and (b, a) belong to quorums c/2 apart. So in full attention every quorum owns c-1 pairs and
a diagonal for every c, and causal loads are exactly level with odd c, within one pair with even c.

**Causal reads.** The lowest chunk of a quorum needs no queries and the highest no keys, unless it owns its diagonal.
Placing S so that its smallest gaps, 2 and 1, lie on both sides of 0 makes that exception as rare as can be: the rows of
Q, K and V read are 3k - 3 + 4/c in units of N instead of 3k (6.6 for 9 at c = 7, 15.1 for 18 at c = 31; c = 21, alone up
to 9,507, has no such set and reads one chunk more).

Sources: Singer 1938 and Colbourn and Ling 2000 for the sets (cited in `difference_sets.py`); Bian and Akey, "Stream-CQSA",
arXiv 2604.20819, for attention divided over cyclic quorum sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from oocattn.division.base import Block, Subproblem, require_index, require_pair
from oocattn.division.difference_sets import difference_cover, perfect_order


def candidate_chunk_counts(limit: int) -> tuple[int, ...]:
    """Every c up to `limit` with a perfect difference set: 1, 3, 7, 13, 21, 31, ..."""
    counts = takewhile(lambda c: c <= limit, (q * q + q + 1 for q in range(limit + 1)))
    return tuple(c for c in counts if perfect_order(c) is not None)


def quorum_size(chunks: int) -> int:
    """k, the number of chunks in a quorum of a set over `chunks` chunks."""
    order = perfect_order(chunks)
    return len(_pattern(chunks).offsets) if order is None else order + 1


@dataclass(frozen=True)
class _Pattern:
    """The pairs of quorum 0, which others translate: tables of 2c integers."""

    offsets: tuple[int, ...]  # the difference cover: the chunks of quorum 0
    query_offset: tuple[int, ...]  # [d] offset x of the query chunk for key - query = d, key x + d; [0] is 0
    key_offsets: dict[int, tuple[int, ...]]  # [x] the offsets that the query chunk at offset x attends, without itself
    query_gap: dict[int, int]  # [x] distance down to the nearest key chunk of x: 0 its own, c none
    key_gap: dict[int, int]  # [y] distance up to the nearest query chunk that attends key chunk y


@lru_cache(maxsize=64)
def _pattern(chunks: int) -> _Pattern:
    offsets = difference_cover(chunks)
    query_offset = [0] * chunks
    for x in offsets:
        for y in offsets:
            difference = (y - x) % chunks
            if 0 < difference <= chunks // 2:
                query_offset[difference] = x
                query_offset[-difference] = y  # of c/2, its own opposite, this one stays
    keys: dict[int, list[int]] = {x: [] for x in offsets}
    query_gap, key_gap = dict.fromkeys(offsets, chunks), dict.fromkeys(offsets, chunks)
    for difference in range(1, chunks):
        x = query_offset[difference]
        y = (x + difference) % chunks
        keys[x].append(y)
        query_gap[x] = min(query_gap[x], chunks - difference)
        key_gap[y] = min(key_gap[y], chunks - difference)
    query_gap[0] = key_gap[0] = 0
    return _Pattern(offsets, tuple(query_offset), {x: tuple(ys) for x, ys in keys.items()}, query_gap, key_gap)


@dataclass(frozen=True)
class CyclicQuorums:
    """CQS Divide: subproblem i is what quorum i of a cyclic quorum set over `chunks` chunks owns. Implements Division.

    Any number of chunks works; those of `candidate_chunk_counts` are perfect, and 1 is the undivided call. The tables of a
    chunk count are made at first use, in well under a second up to 10,000, and shared.
    """

    chunks: int
    triangular: bool

    def __post_init__(self) -> None:
        """Raise ValueError unless there is at least one chunk."""
        if self.chunks < 1:
            raise ValueError(f"{self.chunks} chunks: expected at least 1")

    @property
    def subproblems(self) -> int:
        """One a quorum, so as many as chunks."""
        return self.chunks

    def quorum(self, index: int) -> tuple[int, ...]:
        """The k chunks of quorum `index`, ascending."""
        require_index(index, self.chunks, "quorum")
        return tuple(sorted((index + offset) % self.chunks for offset in _pattern(self.chunks).offsets))

    def subproblem(self, index: int) -> Subproblem:
        """The pairs of quorum `index`: c, or about half of them when triangular."""
        require_index(index, self.chunks, "subproblem")
        blocks = []
        for offset, key_offsets in _pattern(self.chunks).key_offsets.items():
            query_chunk = (index + offset) % self.chunks
            attended = ((index + key_offset) % self.chunks for key_offset in key_offsets)
            key_chunks = tuple(sorted(key for key in attended if not self.triangular or key < query_chunk))
            if key_chunks or offset == 0:
                blocks.append(Block(query_chunk, key_chunks, diagonal=offset == 0))
        blocks.sort(key=lambda block: block.query_chunk)
        needed = {index}.union(*(block.key_chunks for block in blocks))
        return Subproblem(index, tuple(block.query_chunk for block in blocks), tuple(sorted(needed)), tuple(blocks))

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """The quorums with a pair whose query chunk is `chunk`, ascending."""
        require_index(chunk, self.chunks, "query chunk")
        # Triangular: the nearest key below is there unless counting down to it wraps around below chunk 0.
        reach = chunk if self.triangular else self.chunks - 1
        gaps = _pattern(self.chunks).query_gap
        return tuple(sorted((chunk - offset) % self.chunks for offset, gap in gaps.items() if gap <= reach))

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """The quorum that owns the pair."""
        require_pair(self, query_chunk, key_chunk)
        offset = _pattern(self.chunks).query_offset[(key_chunk - query_chunk) % self.chunks]
        return (query_chunk - offset) % self.chunks

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """One lane takes them all: every two chunks lie together in a quorum."""
        return np.zeros(self.chunks, dtype=np.intp)

    def chunk_reads(self) -> tuple[int, int]:
        """See `Division.chunk_reads`."""
        pattern, chunks = _pattern(self.chunks), self.chunks
        gaps = (pattern.query_gap.values(), pattern.key_gap.values())
        if not self.triangular:
            query, key = (chunks * sum(gap < chunks for gap in side) for side in gaps)
        else:
            # An offset is one chunk in each quorum, c in all; the `gap` of them nearest the end have nothing beyond.
            query, key = (sum(chunks - gap for gap in side) for side in gaps)
        return query, key
