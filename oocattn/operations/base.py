"""The interface of operations: all that a lane knows of mathematics.

A lane stages inputs of query chunks and of key chunks, cuts them into tiles, has the operation computed on each, merges the
states, and has finished ones turned into results. What these are is the operation's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from oocattn.division.base import Block
from oocattn.kernels.reductions.base import BlockSums, Float64s, Int64s
from oocattn.kernels.reductions.totals import Totals
from oocattn.kernels.state import AttentionState, Take
from oocattn.operations.staging import StagedRows
from oocattn.operations.tiles import Tile
from oocattn.problem.problem import HeadGroup
from oocattn.problem.staged import StagedArray


@dataclass(frozen=True)
class Input:
    """An array of the dataset of which chunks stage rows: [heads, n, width], or [heads, n] where the width is 0.

    `first` is the token, as the problem counts them, that its first row is of.
    """

    name: str
    width: int
    dtype: torch.dtype
    first: int = 0

    @classmethod
    def of(cls, array: StagedArray) -> Input:
        """That of an array of the problem."""
        return cls(array.name, array.width, getattr(torch, array.dtype), array.first)

    def shape(self, heads: int, rows: int) -> tuple[int, ...]:
        """The shape of so many staged rows."""
        return (heads, rows, self.width) if self.width else (heads, rows)


@dataclass(frozen=True)
class SummedBlock:
    """Sums over the rows of a block, for its keys: the token of each, as the problem counts them; on a GPU `totals`."""

    sums: Sequence[BlockSums] = ()
    key_tokens: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    totals: Totals | None = None

    @property
    def arrays(self) -> list[Float64s]:
        """What is kept with the block's partial; those of a GPU wait for torch's current stream."""
        return [array for each in self.sums for array in each.arrays] if self.totals is None else [*self.totals.arrays]


class Operation(Protocol):
    """The mathematics of a run. Any thread may call it at any time."""

    @property
    def query_inputs(self) -> tuple[Input, ...]:
        """The arrays of which a query chunk stages its rows."""

    @property
    def key_inputs(self) -> tuple[Input, ...]:
        """The arrays of which a key chunk stages its rows."""

    def heads(self, name: str, group: HeadGroup) -> tuple[int, ...]:
        """The heads of an input's array that a head group stages."""

    def owns(self, name: str, head_group: int) -> bool:
        """True if NaN and Inf of an input are counted with this head group: once, where several share its heads."""

    def tiles(self, head_group: int, block: Block, staged: StagedRows, rows: range, size: int) -> Iterator[Tile]:
        """Cut the pairs of some rows of a block, given as the problem counts them, into tiles of at most `size` keys."""

    def compute(
        self,
        head_group: int,
        tile: Tile,
        query: Sequence[Tensor],
        key: Sequence[Tensor],
        state: AttentionState,
        attended: Callable[[int], object] | None = None,
        sums: SummedBlock | None = None,
    ) -> None:
        """Compute a tile, add the result to `state`, and enter the pairs in its ledger.

        On a CPU `attended` is called meanwhile, from any thread, with about so many pairs of a head. What is summed over
        rows is added to the `sums` of the tile's block, where `begin_sums` gives any.

        `query` and `state` are of the rows that the tile was cut for, `key` of the tile's keys: [heads, n, ...] all. On a
        GPU the work is launched on torch's current stream, and nothing waits for it.
        """

    def begin_sums(self, head_group: int, block: Block, staged: StagedRows, take: Take | None = None) -> SummedBlock | None:
        """What is summed over the rows of a block, before its first tile; None for operations that sum nothing.

        On a GPU it lies in the device memory that `take` gives.
        """

    def merge(self, into: AttentionState, other: AttentionState) -> None:
        """Add one state to another of the same rows, in place."""

    def finalise(self, head_group: int, head: int, state: AttentionState, out: Tensor, lse: Tensor) -> None:
        """Turn the state of one head of a group, whose pairs are complete, into results."""

    def wrong_row(self, head_group: int, state: AttentionState, rows: range) -> int | None:
        """The first of some complete rows, given as the problem counts them, whose ledger is wrong; None if there is none.

        One thread calls it at a time: it works in memory of its own.
        """

    def expected(self, head_group: int, row: int) -> tuple[int, int]:
        """The ledger that a row must have: keys, and the sum of their indices modulo 2^64."""
