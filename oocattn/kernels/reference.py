"""The float64 reference kernel: slow, obvious, on any device. What the fast kernels are compared with.

The state that it adds to is float32 like everyone's, so it is right to a few 1e-7; inside a call every product,
exponential and sum is float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from oocattn.kernels.kernel import check_operands, count_keys
from oocattn.kernels.merge import SCRATCH_BYTES, finite_shift, merge
from oocattn.kernels.partial import Partial

PRODUCT_BYTES = 3 << 20
"""Bytes that the CPU's matrix products keep for each thread; 1.7 to 2.8 MiB measured (MKL 2024.2)."""

# Keys and score rows (over all heads) of one float64 score tile: 1 MiB, so that memory stays small whatever the call.
_KEY_TILE = 2048
_ROW_TILE = 64
_SCORE_TILES = 4  # scores, scaled, shifted and exponentiated


class ReferenceKernel:
    """Scores, softmax numerator and denominator written out in float64, tile by tile."""

    name = "reference"
    max_keys = _KEY_TILE

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Partial,
        *,
        scale: float,
        diagonal: bool,
    ) -> None:
        """See `Kernel.attend`. Nothing is computed and then masked, so a NaN or Inf reaches the rows that attend it."""
        check_operands(query, key, value, state, diagonal=diagonal)
        group_size, rows, _ = query.shape
        for first_row, last_row, first_key, last_key in _tiles(group_size, rows, key.shape[0], diagonal):
            _attend_tile(
                query[:, first_row:last_row],
                key[first_key:last_key],
                value[first_key:last_key],
                state.rows(first_row, last_row),
                scale,
            )
        count_keys(state, key.shape[0], diagonal=diagonal)

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str) -> int:
        """See `Kernel.scratch_bytes`: the operands, scores and result of a tile in float64, products and merge."""
        rows = group_size * min(rows, _tile_rows(group_size))
        keys = min(keys, _KEY_TILE)
        tiles = rows * (3 * head_dim + 8) + 2 * keys * head_dim + _SCORE_TILES * rows * keys
        return 8 * tiles + SCRATCH_BYTES + torch.get_num_threads() * PRODUCT_BYTES


def _tile_rows(group_size: int) -> int:
    return max(1, _ROW_TILE // group_size)


def _tiles(group_size: int, rows: int, keys: int, diagonal: bool) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles (first row, last row, first key, last key) that cover the call, each pair of row and key once."""
    step = _tile_rows(group_size)
    for first_row in range(0, rows, step):
        last_row = min(first_row + step, rows)
        full = first_row if diagonal else keys  # the keys that all these rows attend
        for first_key in range(0, full, _KEY_TILE):
            yield first_row, last_row, first_key, min(first_key + _KEY_TILE, full)
        if diagonal:
            yield from ((row, row + 1, first_row, row + 1) for row in range(first_row, last_row))


def _attend_tile(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: Partial, scale: float) -> None:
    scores = query.double() @ key.double().T * scale  # [g, rows, keys]
    maximum = scores.amax(-1).float()
    weights = torch.exp(scores - finite_shift(maximum).double().unsqueeze(-1))
    num = weights @ value.double()  # [g, rows, D]
    merge(state, Partial(num.float(), weights.sum(-1).float(), maximum, torch.zeros_like(state.keys)))
