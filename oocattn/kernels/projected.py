"""Values of a second pass on the CPU, projected to few columns, once for all rows of a call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from oocattn.kernels.kernel import Operands
from oocattn.kernels.own_tensors import own_tensor
from oocattn.units import ceil_div

TILE_KEYS, MOST_TILES = 1024, 64
"""Keys of a tile, whose weights take 1 MiB with 256 rows; and tiles whose values are projected at a time: 2.3 MiB."""


def projected_together(operands: Operands) -> Iterator[Operands]:
    """Parts of a call that differ in keys, few enough to hold their projected values; one part without a projection."""
    if operands.projection is None:
        yield operands
        return
    most = MOST_TILES * TILE_KEYS
    for first in range(0, operands.keys, most):
        part = operands.part(range(operands.rows), range(first, min(first + most, operands.keys)))
        yield replace(part, attended=operands.attended)


class Projected(NamedTuple):
    """Of each tile of keys, the projections with a row of ones, for denominators, and whether all are finite.

    `tiles` are [tiles, W + 1, m], of which the last tile may have fewer keys. Without a projection they are one, of ones.
    """

    tiles: torch.Tensor
    is_finite: list[bool]

    @classmethod
    def empty(cls, operands: Operands) -> Projected:
        """For the values of all keys of a call."""
        count, most = ceil_div(operands.keys, TILE_KEYS), min(operands.keys, TILE_KEYS)
        if operands.projection is None:
            return cls(own_tensor(1, 1, most).fill_(1.0).expand(count, -1, -1), [True] * count)
        tiles = own_tensor(count, operands.projection.shape[1] + 1, most)
        tiles[:, -1] = 1.0
        return cls(tiles, [True] * count)

    def take(self, values: torch.Tensor, projection: torch.Tensor) -> None:
        """Project the values [keys, Dv] by [Dv, W]."""
        turned, value = projection.T.clone(), own_tensor(self.tiles.shape[2], values.shape[1])
        for number, tile in enumerate(self.tiles):
            part = values[number * TILE_KEYS : (number + 1) * TILE_KEYS]
            projected = tile[:-1, : len(part)]
            torch.mm(turned, value[: len(part)].copy_(part).T, out=projected)
            self.is_finite[number] = math.isfinite(float(projected.sum()))
