"""The entropy of each row's weights, -sum_j P_ij log P_ij, in nats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oocattn.kernels.reductions.base import Int64s, RowReduction, RowSums, WeightTile

_LEAST = -200.0  # exponents of weights that are 0 in float32; an infinite one times 0 would be NaN


class Entropy(RowReduction):
    """One column: the entropy of the keys so far. A row without keys has 0."""

    needs_exponents = True
    arrays: Mapping[str, tuple[tuple[int, ...], str]] = {"entropy": ((), "float32")}

    def values(self, columns: NDArray[np.float32], unknown: NDArray[np.bool_]) -> Mapping[str, NDArray[Any]]:
        return {"entropy": np.maximum(columns[..., 0], np.float32(0))}  # a single key may have a weight above 1

    def begin(self, group_size: int, rows: int, keys: Int64s) -> RowSums:
        return _RowEntropy(group_size, rows)

    def add_row_sums(self, columns: Tensor, logarithms: Tensor | None) -> None:
        assert logarithms is not None
        columns[..., 0].add_(logarithms, alpha=-math.log(2))


class _RowEntropy:
    def __init__(self, group_size: int, rows: int) -> None:
        self._group_size = group_size
        self._sums = torch.zeros(group_size * rows, dtype=torch.float64, device="cpu")

    def add(self, tile: WeightTile) -> None:
        assert tile.exponents is not None
        products = tile.exponents.mul_(tile.weights).sum(0)
        if not torch.isfinite(products.sum()):
            products = _bounded(tile)
        self._sums.add_(products)

    def columns(self, factor: Tensor) -> Tensor:
        return (self._sums.view(self._group_size, -1) * factor).mul_(-math.log(2)).float().unsqueeze(2)


def _bounded(tile: WeightTile) -> Tensor:
    """The sums of weights times their logarithms, where some are infinite: those of 0 count for nothing."""
    return tile.weights.log2().clamp_(min=_LEAST).mul_(tile.weights).sum(0)
