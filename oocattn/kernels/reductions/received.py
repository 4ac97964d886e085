"""The sum of the weights that each key receives, over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oocattn.kernels.reductions.base import BlockSums, Float64s, Int64s, KeyReduction, KeySums, Places, WeightTile
from oocattn.problem.calls import CallSize


class Received(KeyReduction):
    """Sums [g, keys] of a block."""

    dimensions = ("key_token",)

    def begin(self, group_size: int, tokens: range, keys: Int64s) -> BlockSums:
        return _Received(np.zeros((group_size, len(keys))))

    def scratch_bytes(self, call: CallSize, rows: int) -> int:
        return 8 * call.group_size * call.keys * (1 + call.threads)

    def shape(self, rows: int, keys: int) -> tuple[int, ...]:
        return (keys,)

    def shapes(self, group_size: int, tokens: range, keys: Sequence[range]) -> Sequence[tuple[int, ...]]:
        return [(group_size, sum(map(len, keys)))]

    def meets(self, span: range, tokens: range, keys: Sequence[range]) -> bool:
        return any(run.start < span.stop and span.start < run.stop for run in keys)

    def place(self, into: Float64s, span: range, sums: Sequence[Float64s], tokens: range, keys: Sequence[range]) -> None:
        before = 0  # keys of the runs before
        for run in keys:
            first, stop = max(run.start, span.start), min(run.stop, span.stop)
            if first < stop:
                place = before + first - run.start
                into[:, first - span.start : stop - span.start] += sums[0][:, place : place + stop - first]
            before += len(run)


class _Received:
    def __init__(self, into: Float64s) -> None:
        self._into = into

    @property
    def arrays(self) -> Sequence[Float64s]:
        return [self._into]

    def begin(self, places: Places, rows: range) -> KeySums:
        return _Sums(self._into[:, places.keys.start : places.keys.stop])


class _Sums:
    def __init__(self, into: Float64s) -> None:
        self._into, self._sums = into, np.zeros(into.shape)

    def add(self, tile: WeightTile) -> None:
        self._sums[:, tile.keys.start : tile.keys.stop] += tile.row_sums.T

    def finish(self) -> None:
        self._into += self._sums
