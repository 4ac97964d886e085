"""Attention in plain torch operations, tile by tile: for every device, dtype and head dimension that torch serves.

The scores of a tile are written out in one precision, float32 here; the float64 reference is the same with other tiles.
"""

from __future__ import annotations

import math

import torch

from oocattn.kernels.cuda.device import allocated_bytes, lacks_capability
from oocattn.kernels.kernel import MAX_KEYS, attended_keys, check_operands, lacks_dtype
from oocattn.kernels.merging import SCRATCH_BYTES, finite_shift, merge
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.kernels.tiles import Tile, make_tiles
from oocattn.problem.problem import DTYPES

_CUBLAS_WORKSPACE = 32 << 20
"""What torch keeps for cuBLAS from the first product on: 32 MiB on Hopper, less on others."""

_MOST_APART = 40.0
"""How far the rounded maximum of a row may lie from the exact one and still be its shift: weights reach exp(40) = 2e17."""

_QUANTUM = 64  # steps above it are cut to a multiple, which suits the matrix products


class PlainKernel:
    """Scores, softmax numerator and denominator as matrix products, in float32 without TF32; merged in float32.

    NaN and Inf reach the rows that attend them and no others, also within the tiles that the diagonal crosses. Everything
    is launched on torch's current stream and nothing waits for it.
    """

    name = "torch"
    plans_shapes = False
    max_keys = MAX_KEYS
    precision = torch.float32
    score_bytes = 64 << 20
    """Bytes of the scores of one tile."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: AttentionState,
        *,
        scale: float,
        diagonal: bool,
    ) -> None:
        """See `Kernel.attend`."""
        check_operands(query, key, value, state, diagonal=diagonal)
        step = self._step(query.shape[0])
        with full_precision(query.device):
            for tile in make_tiles(query.shape[1], key.shape[0], step, step, diagonal=diagonal):
                self._attend_tile(tile, query, key, value, state, scale)

    def _attend_tile(
        self, tile: Tile, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: AttentionState, scale: float
    ) -> None:
        rows, keys = slice(tile.first_row, tile.last_row), slice(tile.first_key, tile.last_key)
        block = state.rows(tile.first_row, tile.last_row)
        scores = (query[:, rows].to(self.precision) * scale) @ key[keys].to(self.precision).T  # [g, rows, keys]
        if tile.diagonal:
            scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu_(1), -math.inf)
        maximum = scores.amax(-1)
        kept = maximum.float()  # as the state holds it
        weights = scores.sub_(_shift(maximum, kept).unsqueeze(-1)).exp_()
        num = _weighted_sum(weights, value[keys].to(self.precision), tile.diagonal)
        counts = attended_keys(block, tile.last_key - tile.first_key, diagonal=tile.diagonal)
        merge(block, AttentionState(num.float(), weights.sum(-1).float(), kept, counts))

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """See `Kernel.scratch_bytes`: what a tile needs, and what cuBLAS keeps."""
        return allocated_bytes(*self._tile_bytes(group_size, rows, keys, head_dim)) + _CUBLAS_WORKSPACE

    def lacks(self, device: torch.device, dtype: str, head_dim: int) -> str:
        """See `Kernel.lacks`."""
        return lacks_dtype(dtype, DTYPES) or ("" if device.type == "cpu" else lacks_capability(device))

    def _step(self, group_size: int) -> int:
        """Rows and keys of a tile, over all heads as many scores as score_bytes holds."""
        step = max(1, math.isqrt(self.score_bytes // self.precision.itemsize // group_size))
        return step - step % _QUANTUM if step > _QUANTUM else step

    def _tile_bytes(self, group_size: int, rows: int, keys: int, head_dim: int) -> tuple[int, ...]:
        """Sizes of the tensors of one tile: scores, mask, operands, numerators, vectors; and of the merge."""
        step, itemsize = self._step(group_size), self.precision.itemsize
        rows, keys = min(rows, step), min(keys, step)
        of_query = group_size * rows * head_dim * itemsize  # cast and scaled; later the numerator, also as float32
        of_value = keys * head_dim * itemsize  # key; value, what is finite of it, and sums of what is not
        vectors = 8 * group_size * rows * itemsize + rows * 8
        return (group_size * rows * keys * itemsize, rows * keys, *[of_query] * 2, *[of_value] * 4, vectors, SCRATCH_BYTES)


def _shift(maximum: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What to subtract from scores before exp: `kept`, the float32 maximum, or as near to it as weights stay finite.

    From scores of about 1e9 on, rounding the maximum to float32 moves it by more than exp can take. The weights of a tile
    are exact all the same; against other tiles the row then counts as float32 scores would.
    """
    finite = finite_shift(maximum)
    return finite - (finite - finite_shift(kept)).clamp_(-_MOST_APART, _MOST_APART)


def _weighted_sum(weights: torch.Tensor, value: torch.Tensor, diagonal: bool) -> torch.Tensor:
    """weights [g, rows, keys] @ value [keys, D]; on the diagonal, NaN and Inf from the rows' own keys on only."""
    if not diagonal:
        return weights @ value
    finite = value.nan_to_num(0.0, 0.0, 0.0)  # a masked weight is 0, and 0 times NaN or Inf would be NaN
    return (weights @ finite).add_((value - finite).cumsum_(0))
