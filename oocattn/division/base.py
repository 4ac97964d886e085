"""The interface of divisions, as in `quorums` and `strips`: pairs to subproblems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oocattn.division.live import LivePairs


@dataclass(frozen=True)
class Block:
    """The chunk pairs of one query chunk within a subproblem; `key_chunks` ascend, and there is at least one."""

    query_chunk: int
    key_chunks: tuple[int, ...]


@dataclass(frozen=True)
class Subproblem:
    """The chunk pairs that one task computes: none of `blocks` is empty.

    `query_chunks` (whose Q is needed, one for each block), `key_chunks` (whose K and V are needed) and `blocks` ascend.
    """

    index: int
    query_chunks: tuple[int, ...]
    key_chunks: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, index: int, blocks: Sequence[Block]) -> Subproblem:
        """The subproblem of these blocks, ascending."""
        needed = set[int]().union(*(block.key_chunks for block in blocks))
        return cls(index, tuple(block.query_chunk for block in blocks), tuple(sorted(needed)), tuple(blocks))


class Division(Protocol):
    """A decomposition of one head group's live chunk pairs; each has exactly one owner.

    Indices out of range raise IndexError; `owner` of a pair that is not live raises ValueError.
    """

    @property
    def live(self) -> LivePairs:
        """The pairs that are divided."""

    @property
    def indices(self) -> Sequence[int]:
        """The subproblems: ascending indices of those that own a live pair."""

    def subproblem(self, index: int) -> Subproblem:
        """Everything that subproblem `index` owns and needs."""

    def pairs(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Query chunk and key chunk of each pair of subproblem `index`, in any order: quick with thousands of chunks."""

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """Ascending indices of the subproblems with a partial for this query chunk."""

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """Index of the one subproblem that owns the pair."""

    def chunk_reads(self) -> tuple[int, int]:
        """Query chunks and key chunks staged, once for every subproblem that needs them; without making subproblems."""

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """The lane, of `lanes`, that merges each query chunk, with all that contributes to it, in its own memory.

        All 0, where subproblems contribute to several chunks: [query chunks].
        """


def require_index(index: int, count: int, what: str) -> None:
    """Raise IndexError unless 0 <= index < count."""
    if not 0 <= index < count:
        raise IndexError(f"{what} {index}: expected 0 to {count - 1}")


def require_pair(live: LivePairs, query_chunk: int, key_chunk: int) -> None:
    """Check a pair: IndexError out of range, ValueError where it is not live."""
    require_index(query_chunk, live.query_chunks, "query chunk")
    require_index(key_chunk, live.key_chunks, "key chunk")
    if not live.has(query_chunk, key_chunk):
        raise ValueError(f"query chunk {query_chunk} does not attend key chunk {key_chunk}")
