"""The interface of reductions: what a second pass makes of softmax weights.

Along keys a reduction has columns of each row in the state of a query chunk (`RowReduction`). Along rows it has sums for the
keys of a block (`KeyReduction`), which are kept with the block's partial: a chunk's keys may be as many as all tokens.

On a CPU a reduction is given the weights tile by tile. On a GPU they never leave the registers: a kernel keeps the largest
of each row and sums of a few kinds (`Totals`), of which each reduction says what it makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.second_pass import Reduced

if TYPE_CHECKING:
    from oocattn.kernels.reductions.totals import Totals

_MERGED = {"cpu": 1 << 15, "cuda": 1 << 19}  # numbers of states that are merged at a time
_MERGING_BYTES = (4, 4, 4, 8, 2)  # of each, in the temporaries of a merge of the largest weights

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class WeightTile:
    """Weights of some rows of g heads and some keys of a call, and where they lie among those of the call.

    `weights` [keys, g rows], float32, the rows of one head after those of another, are 0 where a row does not attend a key;
    so are `exponents`, the logarithms to the base 2 of the others. They are there if a reduction needs them, and may be
    overwritten by the last that does.
    """

    weights: Tensor
    exponents: Tensor | None
    group_size: int
    rows: range
    keys: range

    @cached_property
    def row_sums(self) -> NDArray[np.float32]:
        """Sums over the rows: [keys, g]."""
        found: NDArray[np.float32] = self.weights.unflatten(1, (self.group_size, -1)).sum(2).numpy()
        return found


class RowSums(Protocol):
    """What a reduction has of the rows of a block so far."""

    def add(self, tile: WeightTile) -> None:
        """Add a tile of all rows of the block."""

    def columns(self, factor: Tensor) -> Tensor:
        """The columns of the rows in a state: [g, rows, columns], float32.

        The weights of a row are to be multiplied by its `factor` [g, rows], which is near 1.
        """


class RowReduction(ABC):
    """A reduction along keys."""

    needs_exponents = False

    top = 0
    """Weights of each row that a GPU's kernel keeps in its columns: the largest, falling, and then their keys."""

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """The arrays [B, H, N, ...] that its columns become: by name, what each has of a row, and of which dtype."""

    @abstractmethod
    def values(self, columns: NDArray[np.float32], unknown: NDArray[np.bool_]) -> Mapping[str, NDArray[Any]]:
        """What the arrays have of some rows, from their columns [..., columns]; weights of `unknown` rows are NaN."""

    @abstractmethod
    def begin(self, group_size: int, rows: int, keys: Int64s) -> RowSums:
        """Begin with some rows of g heads, and the token of each key of the call."""

    @abstractmethod
    def add_row_sums(self, columns: Tensor, logarithms: Tensor | None) -> None:
        """Add what a GPU's kernel has of the rows of a call to their columns [g, n, columns], in place.

        `logarithms` [g, n], float32, are sums of weights times their logarithms to the base 2, where the reduction needs
        exponents. What it keeps in the columns (`top`) is there already.
        """

    def scratch_bytes(self, rows: int, keys: int) -> int:
        """Bytes that a tile of so many rows, of all heads, takes at most, besides its block's columns."""
        return 0

    def merge(self, into: Tensor, other: Tensor) -> None:
        """Add the columns [g, n, columns] of the same rows with other keys, in place."""
        into.add_(other)


class Places(NamedTuple):
    """What a call's rows and keys are: its rows, and each of its keys, as the problem counts them.

    `keys` are the places of its keys among those of the block that it is of.
    """

    rows: range
    keys: range
    key_tokens: Int64s


class KeySums(Protocol):
    """What a thread has summed over some rows of a call."""

    def add(self, tile: WeightTile) -> None:
        """Add a tile."""

    def finish(self) -> None:
        """Add what was summed to the block's sums. One thread does at a time, in the order of the rows."""


class BlockSums(Protocol):
    """Sums over the rows of a block for its keys, or groups of them."""

    @property
    def arrays(self) -> Sequence[Float64s]:
        """What is kept of them, contiguous."""

    def begin(self, places: Places, rows: range) -> KeySums:
        """Begin with some of the rows of a call, counted from its first."""


class PoolSize(NamedTuple):
    """Rows, counted from `first`, and keys of a pool."""

    rows: int
    keys: int
    first: int


class KeyReduction(ABC):
    """A reduction along rows."""

    pools: PoolSize | None = None
    """The pools whose weights a GPU's kernel sums for it; None: those of each key."""

    dimensions: Sequence[str]
    """The names of the dimensions of its array after the first two, [B, H]."""

    may_average = False
    """Whether its array may be averaged over heads."""

    def about(self, rows: int, keys: int) -> Mapping[str, int]:
        """What the attributes of its array say, for so many rows and keys."""
        return {}

    @abstractmethod
    def begin(self, group_size: int, tokens: range, keys: Int64s) -> BlockSums:
        """Begin with a block: g heads, its rows, and the token of each of its keys, as the problem counts them."""

    def of_totals(self, totals: Float64s) -> Sequence[Float64s]:
        """`BlockSums.arrays` of a block, from what a GPU summed: [g, keys], or [g, pools of rows, pools of keys].

        There are the pools that have any of the block's rows, and those that have any of its keys.
        """
        return [totals]

    @abstractmethod
    def scratch_bytes(self, call: CallSize, rows: int) -> int:
        """Bytes of the sums of a block as large as a call, and of what threads sum over so many rows each, at most."""

    @abstractmethod
    def shape(self, rows: int, keys: int) -> tuple[int, ...]:
        """The shape of the sums of all blocks, for one head of so many rows and keys."""

    @abstractmethod
    def shapes(self, group_size: int, tokens: range, keys: Sequence[range]) -> Sequence[tuple[int, ...]]:
        """The shapes of `BlockSums.arrays` of a block, whose keys are ascending runs."""

    @abstractmethod
    def meets(self, span: range, tokens: range, keys: Sequence[range]) -> bool:
        """Whether a block of these rows and runs of keys may have any of the part `span` of the shape."""

    @abstractmethod
    def place(self, into: Float64s, span: range, sums: Sequence[Float64s], tokens: range, keys: Sequence[range]) -> None:
        """Add a block's `sums`, of these rows and runs of keys, to those of all blocks: [g, ...] of `span` of the shape."""


Reduction = RowReduction | KeyReduction
MakeReduction = Callable[[Reduced], Reduction]


@dataclass(frozen=True)
class Reducing:
    """What a call makes of its weights: columns of its rows, and sums for its keys."""

    rows: Sequence[tuple[RowReduction, int]]
    """Each with how many columns it has."""

    sums: Sequence[BlockSums]
    places: Places
    totals: Totals | None = None
    """Of a GPU: what is summed over rows, in place of `sums`."""

    @property
    def needs_exponents(self) -> bool:
        """Whether any reduction needs the logarithms of weights."""
        return any(each.needs_exponents for each, _ in self.rows)

    @property
    def columns(self) -> int:
        """Columns of a state."""
        return max(1, sum(columns for _, columns in self.rows))


def merging_sizes(device_type: str, group_size: int, reduced: Sequence[Reduced]) -> tuple[int, ...]:
    """Bytes of the tensors that `merge_reduced` takes at a time, at most, besides the states of g heads; none for sums."""
    if not any(each.name == "top_keys" for each in reduced):
        return ()
    numbers = max(_MERGED[device_type], group_size * sum(each.columns for each in reduced))
    return tuple(count * numbers for count in _MERGING_BYTES)


def merge_reduced(rows: Sequence[tuple[RowReduction, int]], into: AttentionState, other: AttentionState) -> None:
    """Add a state, with the columns of these reductions, to one of the same rows, in place."""
    group_size, count, width = into.num.shape
    step = max(1, _MERGED[into.num.device.type] // (group_size * width))
    for start in range(0, count, step):
        first = 0
        for reduction, columns in rows:
            part = slice(None), slice(start, start + step), slice(first, first + columns)
            reduction.merge(into.num[part], other.num[part])
            first += columns
    into.den.add_(other.den)
    torch.maximum(into.max, other.max, out=into.max)
    into.keys.add_(other.keys)
    into.key_sum.add_(other.key_sum)
