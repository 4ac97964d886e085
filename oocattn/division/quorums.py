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

**Dead pairs**, of which no row attends a key, have no owner: what a quorum computes and reads is what its live pairs need.
Chunk a of the queries and chunk a of the keys are the a-th of c equal parts of each, so all of this holds for any numbers of
both.

Sources: Singer 1938 and Colbourn and Ling 2000 for the sets (cited in `difference_sets.py`); Bian and Akey, "Stream-CQSA",
arXiv 2604.20819, for attention divided over cyclic quorum sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from oocattn.division.base import Block, Subproblem, require_index, require_pair
from oocattn.division.difference_sets import difference_cover, perfect_order
from oocattn.division.live import LivePairs


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
    x, y = (each.ravel() for each in np.meshgrid(offsets, offsets, indexing="ij"))
    difference = (y - x) % chunks
    near = (difference > 0) & (difference <= chunks // 2)
    query_offset = np.zeros(chunks, np.int64)
    query_offset[difference[near]] = x[near]
    query_offset[-difference[near]] = y[near]  # of c/2, its own opposite, this one stays
    differences = np.arange(1, chunks)
    queries = query_offset[1:]
    keys, gaps = (queries + differences) % chunks, chunks - differences
    query_gap, key_gap = (np.full(chunks, chunks) for _ in range(2))
    np.minimum.at(query_gap, queries, gaps)
    np.minimum.at(key_gap, keys, gaps)
    query_gap[0] = key_gap[0] = 0
    in_order = np.argsort(queries, kind="stable")
    of_queries = np.split(keys[in_order], np.searchsorted(queries[in_order], offsets[1:]))
    return _Pattern(
        offsets,
        tuple(query_offset.tolist()),
        {offset: tuple(found.tolist()) for offset, found in zip(offsets, of_queries, strict=True)},
        {offset: int(query_gap[offset]) for offset in offsets},
        {offset: int(key_gap[offset]) for offset in offsets},
    )


@dataclass(frozen=True, eq=False)
class CyclicQuorums:
    """CQS Divide: subproblem i is what quorum i of a cyclic quorum set owns of the live pairs. Implements Division.

    There are as many key chunks as query chunks. Any number works; those of `candidate_chunk_counts` are perfect, and 1 is
    the undivided call. The tables of a chunk count are made at first use, in well under a second up to 10,000, and shared.
    """

    live: LivePairs

    def __post_init__(self) -> None:
        """Raise ValueError unless there is at least one chunk, and as many of keys as of queries."""
        if not 1 <= self.live.query_chunks == self.live.key_chunks:
            raise ValueError(
                f"{self.live.query_chunks} query chunks and {self.live.key_chunks} key chunks: expected as many, at least 1"
            )

    @property
    def chunks(self) -> int:
        """c, the number of chunks, and of quorums."""
        return self.live.query_chunks

    @cached_property
    def indices(self) -> Sequence[int]:
        """The quorums that own a live pair: all, where all pairs are live, or those up to the diagonal."""
        if self.is_regular:
            return range(self.chunks)
        return self._needed[2]

    def quorum(self, index: int) -> tuple[int, ...]:
        """The k chunks of quorum `index`, ascending."""
        require_index(index, self.chunks, "quorum")
        return tuple(sorted((index + offset) % self.chunks for offset in _pattern(self.chunks).offsets))

    def subproblem(self, index: int) -> Subproblem:
        """The live pairs of quorum `index`: c, or about half of them when they are triangular."""
        require_index(index, self.chunks, "subproblem")
        blocks = []
        for offset, key_offsets in _pattern(self.chunks).key_offsets.items():
            query_chunk = (index + offset) % self.chunks
            keys = {(index + key_offset) % self.chunks for key_offset in key_offsets}
            if offset == 0:
                keys.add(index)
            if found := tuple(sorted(self._live_of(query_chunk, keys))):
                blocks.append(Block(query_chunk, found))
        return Subproblem.of(index, sorted(blocks, key=lambda block: block.query_chunk))

    def pairs(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See `Division.pairs`: those of quorum 0, translated."""
        require_index(index, self.chunks, "subproblem")
        query, key = ((each + index) % self.chunks for each in self._first_pairs)
        if not self.live.is_full:
            live = key <= query if self.live.is_triangular else self.live.are_live(query, key)
            query, key = query[live], key[live]
        return query, key

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """The quorums with a live pair whose query chunk is `chunk`, ascending."""
        require_index(chunk, self.chunks, "query chunk")
        if not self.is_regular:
            return tuple(sorted({self._owner(chunk, key) for key in self.live.keys(chunk)}))
        # Triangular: the nearest key below is there unless counting down to it wraps around below chunk 0.
        reach = self.chunks - 1 if self.live.is_full else chunk
        gaps = _pattern(self.chunks).query_gap
        return tuple(sorted((chunk - offset) % self.chunks for offset, gap in gaps.items() if gap <= reach))

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """The quorum that owns the pair."""
        require_pair(self.live, query_chunk, key_chunk)
        return self._owner(query_chunk, key_chunk)

    def owners(self, query_chunks: NDArray[Any], key_chunks: NDArray[Any]) -> NDArray[Any]:
        """The quorums that own pairs: of each query chunk and key chunk, an integer array each."""
        offsets = np.asarray(_pattern(self.chunks).query_offset, query_chunks.dtype)
        of_differences = np.concatenate([offsets[1:], offsets])  # from 1 - c to c - 1
        owner = query_chunks - of_differences[key_chunks - query_chunks + self.chunks - 1]
        owner[owner < 0] += self.chunks
        return cast(NDArray[Any], owner)

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """One lane takes them all: every two chunks lie together in a quorum."""
        return np.zeros(self.chunks, dtype=np.intp)

    def chunk_reads(self) -> tuple[int, int]:
        """See `Division.chunk_reads`: in closed form where all pairs are live, or those up to the diagonal."""
        if not self.is_regular:
            return self._needed[:2]
        pattern, chunks = _pattern(self.chunks), self.chunks
        gaps = (pattern.query_gap.values(), pattern.key_gap.values())
        if self.live.is_full:
            query, key = (chunks * sum(gap < chunks for gap in side) for side in gaps)
        else:
            # An offset is one chunk in each quorum, c in all; the `gap` of them nearest the end have nothing beyond.
            query, key = (sum(chunks - gap for gap in side) for side in gaps)
        return query, key

    def keys_read(self, rows: Sequence[int]) -> int:
        """Keys that the quorums need, each once for each quorum, where each key chunk has so many `rows`, all of them."""
        if self.is_regular:
            raise ValueError("all chunks are read alike")  # `chunk_reads` says how often
        return int(self._needed[3] @ np.asarray(rows, np.int64))

    @property
    def is_regular(self) -> bool:
        """True if all pairs are live, or those up to the diagonal."""
        return self.live.is_full or self.live.is_triangular

    @cached_property
    def _first_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Query chunks and key chunks of quorum 0, live or not: one pair for each difference."""
        query = np.asarray(_pattern(self.chunks).query_offset, np.int64)
        return query, query + np.arange(self.chunks)

    def _live_of(self, query_chunk: int, keys: set[int]) -> Iterable[int]:
        """Those of some key chunks that a query chunk attends."""
        if self.live.is_full:
            return keys
        ranges = self.live.ranges(query_chunk)
        return (key for key in keys if any(key in part for part in ranges))

    def _owner(self, query_chunk: int, key_chunk: int) -> int:
        offset = _pattern(self.chunks).query_offset[(key_chunk - query_chunk) % self.chunks]
        return (query_chunk - offset) % self.chunks

    @cached_property
    def _needed(self) -> tuple[int, int, tuple[int, ...], NDArray[np.int64]]:
        """The query chunks and key chunks that all quorums need, and the quorums that need any: from every live pair.

        Also how many of the quorums need each key chunk.
        """
        pattern, matrix, chunks = _pattern(self.chunks), self.live.matrix(), np.arange(self.chunks)
        offsets = np.asarray(pattern.query_offset)
        queries, at = _any_of(_by_difference(matrix), offsets)
        keys, _ = _any_of(_by_difference(matrix.T)[:, -chunks], (offsets + chunks) % len(chunks))
        index = np.flatnonzero(np.bincount(((chunks[:, None] - at) % len(chunks))[queries]))
        of_keys = keys.sum(1, dtype=np.int64)
        return int(queries.sum()), int(of_keys.sum()), tuple(index.tolist()), of_keys


def _by_difference(matrix: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of a square matrix [a, b] the one with (b - a) modulo its size in place of b: a view of two copies side by side."""
    size = len(matrix)
    twice = np.empty((size, 2 * size), bool)
    twice[:, :size] = twice[:, size:] = matrix
    return np.lib.stride_tricks.as_strided(twice, (size, size), (2 * size + 1, 1), writeable=False)


def _any_of(matrix: NDArray[np.bool_], offsets: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows have any in the columns of each offset: [rows, offsets], and the offsets, ascending."""
    order = np.argsort(offsets, kind="stable")
    found, first = np.unique(offsets[order], return_index=True)
    return np.logical_or.reduceat(matrix[:, order], first, axis=1), found
