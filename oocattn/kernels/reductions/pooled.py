"""Weights summed over blocks of neighbouring rows and neighbouring keys: a map of what attends what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oocattn.kernels.reductions.base import BlockSums, Float64s, Int64s, KeyReduction, KeySums, Places, PoolSize, WeightTile
from oocattn.problem.bounds import join_ranges
from oocattn.problem.calls import CallSize
from oocattn.units import ceil_div

_KEY_BYTES = 28
"""Of the pool of each key of a block, and of what finds it."""


class Pooled(KeyReduction):
    """Sums [g, pools of rows, pools of keys] of a block, of those pools that have any of its rows and of its keys.

    A pool has `rows` rows, counted from `first`, or `keys` keys; of the latter there are `most` in all.
    """

    dimensions = ("row_block", "key_block")
    may_average = True

    def __init__(self, rows: int, keys: int, first: int, most: int) -> None:
        self._rows, self._keys, self._first, self._most = rows, keys, first, most
        self.pools = PoolSize(rows, keys, first)

    def begin(self, group_size: int, tokens: range, keys: Int64s) -> BlockSums:
        return _Pooled(group_size, self._of_rows(tokens), keys // self._keys, tokens.start)

    def scratch_bytes(self, call: CallSize, rows: int) -> int:
        pools = min(call.keys, self._most)
        of_block, of_thread = (2 + ceil_div(count, self._rows) for count in (call.rows, rows))
        return 8 * call.group_size * pools * (of_block + call.threads * of_thread) + _KEY_BYTES * call.keys

    def about(self, rows: int, keys: int) -> Mapping[str, int]:
        pools = {"row_block": self._rows, "key_block": self._keys, "first_row": self._first}
        return {**pools, "rows": rows, "keys": keys}

    def shape(self, rows: int, keys: int) -> tuple[int, ...]:
        return ceil_div(rows, self._rows), self._most

    def shapes(self, group_size: int, tokens: range, keys: Sequence[range]) -> Sequence[tuple[int, ...]]:
        of_keys = sum(map(len, self._pools_of_keys(keys)))
        return [(group_size, len(self._pools_of_rows(tokens)), max(1, of_keys))]

    def meets(self, span: range, tokens: range, keys: Sequence[range]) -> bool:
        of_rows = self._pools_of_rows(tokens)
        return of_rows.start < span.stop and span.start < of_rows.stop

    def place(self, into: Float64s, span: range, sums: Sequence[Float64s], tokens: range, keys: Sequence[range]) -> None:
        of_rows, before = self._pools_of_rows(tokens), 0
        first, stop = max(of_rows.start, span.start), min(of_rows.stop, span.stop)
        found = sums[0][:, first - of_rows.start : stop - of_rows.start]
        for pools in self._pools_of_keys(keys):
            of_keys = slice(before, before + len(pools))
            into[:, first - span.start : stop - span.start, pools.start : pools.stop] += found[:, :, of_keys]
            before += len(pools)

    def _of_rows(self, tokens: range) -> Int64s:
        """The number of the pool that each of some rows is in."""
        return (np.arange(tokens.start, tokens.stop) - self._first) // self._rows

    def _pools_of_rows(self, tokens: range) -> range:
        """The pools that have any of some rows."""
        first, last = ((token - self._first) // self._rows for token in (tokens.start, tokens.stop - 1))
        return range(first, last + 1)

    def _pools_of_keys(self, keys: Sequence[range]) -> list[range]:
        """The pools that have any key of some runs."""
        return join_ranges(range(run.start // self._keys, (run.stop - 1) // self._keys + 1) for run in keys if run)


class _Pooled:
    def __init__(self, group_size: int, of_rows: Int64s, of_keys: Int64s, first_row: int) -> None:
        self._first_row = first_row
        self._of_rows = of_rows - of_rows[:1]
        self._of_keys = np.cumsum(np.diff(of_keys, prepend=of_keys[:1]) > 0)  # keys ascend
        self._into = np.zeros((group_size, int(self._of_rows[-1]) + 1, int(self._of_keys[-1:].sum()) + 1))

    @property
    def arrays(self) -> Sequence[Float64s]:
        return [self._into]

    def begin(self, places: Places, rows: range) -> KeySums:
        first = places.rows.start - self._first_row
        of_rows = self._of_rows[first + rows.start : first + rows.stop]
        of_keys = self._of_keys[places.keys.start : places.keys.stop]
        into = self._into[:, int(of_rows[0]) : int(of_rows[-1]) + 1, int(of_keys[0]) : int(of_keys[-1]) + 1]
        return _Sums(into, of_rows - of_rows[0], of_keys - of_keys[0], rows.start)


class _Sums:
    def __init__(self, into: Float64s, of_rows: Int64s, of_keys: Int64s, first_row: int) -> None:
        self._into, self._sums = into, np.zeros(into.shape)
        self._of_rows, self._of_keys, self._first_row = of_rows, of_keys, first_row

    def add(self, tile: WeightTile) -> None:
        first = self._first_row
        of_rows = self._of_rows[tile.rows.start - first : tile.rows.stop - first]
        of_keys = self._of_keys[tile.keys.start : tile.keys.stop]
        pooled = np.add.reduceat(
            _sum_rows(tile, of_rows), _edges(of_keys), axis=0, dtype=np.float64
        )  # [pools of keys, g, pools of rows]
        rows, keys = (slice(int(pools[0]), int(pools[-1]) + 1) for pools in (of_rows, of_keys))
        self._sums[:, rows, keys] += pooled.transpose(1, 2, 0)

    def finish(self) -> None:
        self._into += self._sums


def _sum_rows(tile: WeightTile, pools: NDArray[np.int64]) -> NDArray[np.float32]:
    """The weights of a tile summed over the rows of each pool: [keys, g, pools]."""
    edges = _edges(pools)
    if len(edges) == 1:
        return tile.row_sums[:, :, np.newaxis]
    if len(set(np.diff(edges, append=len(pools)).tolist())) > 1:
        return np.add.reduceat(tile.weights.unflatten(1, (tile.group_size, -1)).numpy(), edges, axis=2)
    found: NDArray[np.float32] = tile.weights.unflatten(1, (tile.group_size, len(edges), -1)).sum(3).numpy()
    return found  # three times as fast


def _edges(pools: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where each pool begins."""
    return np.concatenate([[0], np.flatnonzero(np.diff(pools)) + 1])
