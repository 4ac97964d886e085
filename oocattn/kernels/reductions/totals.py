"""What a GPU sums over the rows of a block, in its own memory: the weights of each key, and of pools of rows and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oocattn.kernels.reductions.base import Float64s, KeyReduction, PoolSize, RowReduction
from oocattn.kernels.state import Take


@dataclass(frozen=True)
class Pools:
    """Sums [2, g, pools of rows, pools of keys] of the pools that have any rows and keys of a block, from the first on.

    Row i of a block is in the pool (i + before) // rows; `of_keys` [keys], int32, are the pools of its keys.
    """

    sums: Tensor
    of_keys: Tensor
    rows: int
    before: int


@dataclass(frozen=True)
class Totals:
    """Sums over the rows of a block, float64, each in two numbers. Implements BlockSums, as far as a block is handed over.

    `received` [2, g, keys] are those of each key, where any of the reductions needs them. `tokens` are the rows of the
    block, and `key_numbers` [keys], int32, its keys, as the problem counts them; where these are kept with weights.
    """

    reductions: Sequence[KeyReduction]
    tokens: range
    key_numbers: Tensor | None
    received: Tensor | None
    pools: Pools | None

    @classmethod
    def begin(
        cls,
        along_keys: Sequence[RowReduction],
        along_rows: Sequence[KeyReduction],
        group_size: int,
        tokens: range,
        runs: Sequence[range],
        take: Take,
    ) -> Totals:
        """Begin with a block of g heads, its rows, and its keys as ascending runs, in memory that `take` gives.

        All is enqueued on torch's current stream.
        """
        runs = [run for run in runs if run]
        keys = sum(map(len, runs))
        numbers = _of_runs(take, keys, runs, lambda part, run: None) if any(each.top for each in along_keys) else None
        sizes = [each.pools for each in along_rows]
        received = take((2, group_size, keys), torch.float64).zero_() if None in sizes else None
        pools = next((_pools(size, group_size, tokens, runs, take) for size in sizes if size is not None), None)
        return cls(along_rows, tokens, numbers, received, pools)

    @property
    def arrays(self) -> Sequence[Float64s]:
        """What is kept of them with a partial, in host memory; waits for torch's current stream."""
        received = _on_host(self.received)
        pooled = _on_host(None if self.pools is None else self.pools.sums)
        return [array for each in self.reductions for array in each.of_totals(received if each.pools is None else pooled)]


def _pools(size: PoolSize, group_size: int, tokens: range, runs: Sequence[range], take: Take) -> Pools:
    first, last = ((token - size.first) // size.rows for token in (tokens.start, tokens.stop - 1))
    lacking = list(_lacking(runs, size.keys))
    count = 1 + (runs[-1].stop - 1) // size.keys - lacking[-1] if runs else 1
    shifts = iter(lacking)

    def number(part: Tensor, run: range) -> None:
        part.floor_divide_(size.keys).sub_(next(shifts))

    of_keys = _of_runs(take, sum(map(len, runs)), runs, number)
    sums = take((2, group_size, last - first + 1, count), torch.float64).zero_()
    return Pools(sums, of_keys, size.rows, tokens.start - size.first - first * size.rows)


def _lacking(runs: Sequence[range], pool: int) -> Iterator[int]:
    """For each run, how many of the pools up to any of its keys have no key of the runs."""
    lacking, stop = 0, 0
    for run in runs:
        lacking += max(0, run.start // pool - stop)
        stop = (run.stop - 1) // pool + 1
        yield lacking


def _of_runs(take: Take, keys: int, runs: Sequence[range], make: Callable[[Tensor, range], object]) -> Tensor:
    """The numbers of the keys of some runs, int32 [keys], of which `make` makes others, in place."""
    numbers, first = take((keys,), torch.int32), 0
    for run in runs:
        part = numbers[first : first + len(run)]
        torch.arange(run.start, run.stop, out=part)
        make(part, run)
        first += len(run)
    return numbers


def _on_host(parts: Tensor | None) -> Float64s:
    """The sums, of large and small parts."""
    if parts is None:
        return torch.empty(0, dtype=torch.float64, device="cpu").numpy()
    large, small = parts.to("cpu", copy=True).numpy()
    large += small
    found: Float64s = large
    return found
