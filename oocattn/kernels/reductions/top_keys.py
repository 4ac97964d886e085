"""The keys of the largest weights of each row, and these weights.

A weight counts where it is above the smallest one that its row keeps so far: of the keys of tile t about k / t for each row.
So most weights are looked at once, for a comparison. Where many count, as at first, a tile is taken in halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oocattn.kernels.reductions.base import Int64s, RowReduction, RowSums, WeightTile

_MOST_FOUND = 8192  # weights that are sorted at a time, unless those of one key are more
_LAST = (1 << 31) - 1  # more than the number of any key


class TopKeys(RowReduction):
    """Columns of the `count` largest weights of a row, falling, and then of their keys.

    A key is the bits of an int32, its number plus 1; 0, with a weight of 0, stands for none. Of equal weights of a call that
    of the first key is kept.
    """

    def __init__(self, count: int) -> None:
        self._count = self.top = count

    @property
    def arrays(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {"top_keys": ((self._count,), "int64"), "top_weights": ((self._count,), "float32")}

    def values(self, columns: NDArray[np.float32], unknown: NDArray[np.bool_]) -> Mapping[str, NDArray[Any]]:
        of_weights, of_keys = self._parts
        weights = np.ascontiguousarray(columns[..., of_weights])
        weights[unknown] = np.nan
        keys = columns.view(np.int32)[..., of_keys].astype(np.int64)
        keys -= 1
        return {"top_keys": keys, "top_weights": weights}

    def begin(self, group_size: int, rows: int, keys: Int64s) -> RowSums:
        return _RowTop(self._count, group_size, rows, keys)

    def add_row_sums(self, columns: Tensor, logarithms: Tensor | None) -> None:
        """There is nothing to add."""

    def merge(self, into: Tensor, other: Tensor) -> None:
        weights, keys = (torch.cat([into[..., part], other[..., part]], -1) for part in self._parts)
        order = torch.sort(weights, dim=-1, descending=True, stable=True).indices[..., : self._count]
        for part, columns in zip(self._parts, (weights, keys), strict=True):
            into[..., part].copy_(columns.gather(-1, order))  # of keys as they are: arithmetic would not keep their bits

    def scratch_bytes(self, rows: int, keys: int) -> int:
        found = max(_MOST_FOUND, rows)
        return rows * keys + 48 * found + 8 * rows * (min(keys, found) + 2 * self._count)

    @property
    def _parts(self) -> tuple[slice, slice]:
        return slice(0, self._count), slice(self._count, 2 * self._count)


class _RowTop:
    """What is kept of each row is in `_kept`, ascending: the bits of a weight, and below them how far its key is from the
    last possible one, so that of equal weights the first key counts as the largest."""

    def __init__(self, count: int, group_size: int, rows: int, tokens: Int64s) -> None:
        self._count, self._group_size, self._tokens = count, group_size, tokens
        self._kept = np.zeros((group_size * rows, count), np.int64)
        self._least = np.zeros(group_size * rows, np.float32)

    def add(self, tile: WeightTile) -> None:
        self._add(tile.weights.numpy(), tile.keys.start)

    def columns(self, factor: Tensor) -> Tensor:
        kept = self._kept[:, ::-1]
        keys = np.where(kept > 0, _LAST - (kept & _LAST) + 1, 0).astype(np.int32)
        weights = torch.from_numpy(_weights_of(kept)) * factor.flatten().unsqueeze(1)
        of_rows = torch.cat([weights.float(), torch.from_numpy(keys).view(torch.float32)], 1)
        return of_rows.view(self._group_size, -1, 2 * self._count)

    def _add(self, weights: NDArray[np.float32], first: int) -> None:
        """Add weights [keys, g rows], the first of which is of the key `first` of the call."""
        above = weights > self._least
        count, half = int(np.count_nonzero(above)), len(weights) // 2
        if count > _MOST_FOUND and half:
            self._add(weights[:half], first)
            self._add(weights[half:], first + half)
        elif count:
            self._keep(weights, first, np.flatnonzero(above).astype(np.int32))

    def _keep(self, weights: NDArray[np.float32], first: int, found: NDArray[np.int32]) -> None:
        """Keep the largest of what is there and of the weights at the places that were found."""
        of_keys = found // weights.shape[1]
        of_rows = found - of_keys * weights.shape[1]
        order = np.argsort(of_rows.astype(np.uint16), kind="stable")  # sorts by counting
        of_keys, of_rows = of_keys[order], of_rows[order]
        counts = np.bincount(of_rows, minlength=weights.shape[1])
        rows = np.flatnonzero(counts)
        numbers, starts = np.cumsum(counts > 0) - 1, np.cumsum(counts) - counts - self._count  # of all rows
        candidates = np.zeros((len(rows), self._count + int(counts.max())), np.int64)
        candidates[:, : self._count] = self._kept[rows]
        bits = weights[of_keys, of_rows].view(np.int32).astype(np.int64)  # they ascend as the weights, which are positive
        candidates[numbers[of_rows], np.arange(len(order)) - starts[of_rows]] = bits << 32 | (
            _LAST - self._tokens[first:][of_keys]
        )
        candidates.sort(axis=1)
        self._kept[rows] = candidates[:, -self._count :]
        self._least[rows] = _weights_of(candidates[:, -self._count])


def _weights_of(kept: NDArray[np.int64]) -> NDArray[np.float32]:
    return (kept >> 32).astype(np.int32).view(np.float32)
