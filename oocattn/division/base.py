"""The interface of divisions, as in `quorums` and `strips`: pairs to subproblems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Block:
    """The chunk pairs of one query chunk within a subproblem.

    `key_chunks` are ascending, without the query chunk itself: `diagonal` says whether its pair with itself is owned too.
    """

    query_chunk: int
    key_chunks: tuple[int, ...]
    diagonal: bool


@dataclass(frozen=True)
class Subproblem:
    """The chunk pairs that one task computes: none of `blocks` is empty.

    `query_chunks` (whose Q is needed, one for each block), `key_chunks` (whose K and V are needed) and `blocks` ascend.
    """

    index: int
    query_chunks: tuple[int, ...]
    key_chunks: tuple[int, ...]
    blocks: tuple[Block, ...]


class Division(Protocol):
    """A decomposition of one head group's chunk pairs; each has exactly one owner.

    Triangular divisions own the pairs with key chunk <= query chunk, others all c^2. Indices out of range raise IndexError;
    `owner` of a pair above the triangle raises ValueError.
    """

    @property
    def chunks(self) -> int:
        """c, the number of chunks."""

    @property
    def triangular(self) -> bool:
        """True if no chunk attends a later one: `problem.mask.Mask.triangular`."""

    @property
    def subproblems(self) -> int:
        """Number of subproblems."""

    def subproblem(self, index: int) -> Subproblem:
        """Everything that subproblem `index` owns and needs."""

    def contributors(self, chunk: int) -> tuple[int, ...]:
        """Ascending indices of the subproblems with a partial for this query chunk."""

    def owner(self, query_chunk: int, key_chunk: int) -> int:
        """Index of the one subproblem that owns the pair."""

    def chunk_reads(self) -> tuple[int, int]:
        """Query chunks and key chunks staged, once for every subproblem that needs them; in closed form."""

    def chunk_lanes(self, lanes: int) -> NDArray[np.intp]:
        """The lane, of `lanes`, that merges each query chunk, with all that contributes to it, in its own memory: [chunks].

        All 0, where subproblems contribute to several chunks.
        """


def require_index(index: int, count: int, what: str) -> None:
    """Raise IndexError unless 0 <= index < count."""
    if not 0 <= index < count:
        raise IndexError(f"{what} {index}: expected 0 to {count - 1}")


def require_pair(division: Division, query_chunk: int, key_chunk: int) -> None:
    """Check a pair: IndexError out of range, ValueError above the triangle."""
    require_index(query_chunk, division.chunks, "query chunk")
    require_index(key_chunk, division.chunks, "key chunk")
    if division.triangular and key_chunk > query_chunk:
        raise ValueError(f"query chunk {query_chunk} does not attend key chunk {key_chunk}: the mask is triangular")
