"""The interface of operations: all that a lane knows of mathematics.

A lane stages inputs of query chunks and of key chunks, cuts them into tiles, has the operation computed on each, merges the
states, and has finished ones turned into results. What these are is the operation's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from oocattn.division.base import Block
from oocattn.kernels.state import AttentionState
from oocattn.operations.ledger import ExpectedLedger
from oocattn.operations.tiles import Tile


class Operation(Protocol):
    """The mathematics of a run. Any thread may call it at any time."""

    query_inputs: tuple[str, ...]  # the arrays of which a query chunk stages its rows, [g, n, D] each
    key_inputs: tuple[str, ...]  # the arrays of which a key chunk stages its rows, [m, D] each, for all heads

    def tiles(self, head_group: int, block: Block, key_rows: Mapping[int, range], rows: range, size: int) -> Iterator[Tile]:
        """Cut the pairs of rows `rows` of a block into tiles of at most `size` keys, which `key_rows` says where to find."""

    def compute(self, tile: Tile, query: Sequence[Tensor], key: Sequence[Tensor], state: AttentionState) -> None:
        """Compute a tile, add the result to `state`, and enter the pairs in its ledger.

        `query` and `state` are of the rows that the tile was cut for, `key` of the tile's keys. On a GPU the work is
        launched on torch's current stream, and nothing waits for it.
        """

    def merge(self, into: AttentionState, other: AttentionState) -> None:
        """Add one state to another of the same rows, in place."""

    def finalise(self, state: AttentionState, out: Tensor, lse: Tensor) -> None:
        """Turn a state whose pairs are complete into results."""

    def expected(self, head_group: int, rows: range) -> ExpectedLedger:
        """The ledger that complete rows, given by their tokens, must have."""
