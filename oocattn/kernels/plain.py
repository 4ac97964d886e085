"""Attention in plain torch operations, tile by tile, wherever torch runs: in float32, and the float64 reference."""

from __future__ import annotations

import math

import numpy as np
import torch

from oocattn.kernels.cuda.device import allocated_bytes, capability_reason
from oocattn.kernels.intervals import Int32s
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import SCRATCH_BYTES, finite_shift, merge
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.problem.problem import DTYPES

_CUBLAS_WORKSPACE = 32 << 20  # bytes that torch keeps for cuBLAS: 32 MiB on Hopper, less on others
PRODUCT_BYTES = 3 << 20  # bytes of the CPU's matrix products per thread; measured: 1.7 to 2.8 MiB (MKL)
_MOST_APART = 40.0  # the most that a row's shift may lie from its maximum: weights reach exp(40)

_QUANTUM = 64  # steps above it are cut to a multiple, which suits the matrix products


class PlainKernel(Kernel):
    """Attention as matrix products in float32 without TF32; merged in float32.

    NaN and Inf reach the rows that attend them and no others, also within the tiles whose rows attend different keys.
    Everything is launched on torch's current stream and nothing waits for it. It serves any intervals, also for the other
    kernels of its device.
    """

    name = "torch"
    precision = torch.float32
    score_bytes = 64 << 20
    """Bytes of the scores of one tile."""

    def attend(self, operands: Operands, state: AttentionState) -> None:
        operands.check(state)
        query, key, value, intervals = operands.query, operands.key, operands.value, operands.intervals
        step = self._step(len(query))
        with full_precision(query.device):
            for first in range(0, operands.keys, step):
                keys = slice(first, first + step)
                for row in range(0, operands.rows, step):
                    part = intervals and intervals.part(row, row + step, first, first + step)
                    tile = Operands(query[:, row : row + step], key[keys], value[keys], operands.scores, part)
                    self._attend_tile(tile, state.rows(row, row + step))

    def _attend_tile(self, tile: Operands, state: AttentionState) -> None:
        intervals = None if tile.intervals is None else tile.intervals.values()
        if intervals is not None and not (intervals[:, ::2] < intervals[:, 1::2]).any():
            return
        scores = (tile.query.to(self.precision) * tile.scores.scale) @ tile.key.to(self.precision).T  # [g, rows, keys]
        if intervals is not None:
            _hide(scores, intervals)
        maximum = scores.amax(-1)
        kept = maximum.float()  # as the state holds it
        weights = scores.sub_(_shift(maximum, kept).unsqueeze(-1)).exp_()
        num = _weighted_sum(weights, tile.value.to(self.precision), intervals)
        merge(state, AttentionState.without_ledger(num.float(), weights.sum(-1).float(), kept))

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        return allocated_bytes(*self._tile_bytes(group_size, rows, keys, head_dim)) + _CUBLAS_WORKSPACE

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int) -> str:
        return unsupported_dtype(dtype, DTYPES) or ("" if device.type == "cpu" else capability_reason(device))

    def _step(self, group_size: int) -> int:
        """Rows and keys of a tile, over all heads as many scores as score_bytes holds."""
        step = max(1, math.isqrt(self.score_bytes // self.precision.itemsize // group_size))
        return step - step % _QUANTUM if step > _QUANTUM else step

    def _tile_bytes(self, group_size: int, rows: int, keys: int, head_dim: int) -> tuple[int, ...]:
        """Sizes of a tile's tensors: scores, masks, operands, numerators, vectors, merge."""
        step, itemsize = self._step(group_size), self.precision.itemsize
        rows, keys = min(rows, step), min(keys, step)
        of_query = group_size * rows * head_dim * itemsize  # cast and scaled; later the numerator, also as float32
        of_value = keys * head_dim * itemsize  # key; value, and what is finite of it
        counted = (keys + 1) * head_dim * 4, *[rows * head_dim * 4] * 2, 4 * rows * head_dim, rows * head_dim * itemsize
        vectors = 8 * group_size * rows * itemsize + rows * 16 * (4 + 1)
        scores = group_size * rows * keys * itemsize
        return (scores, (rows + 1) * keys, *[of_query] * 2, *[of_value] * 3, *counted, vectors, SCRATCH_BYTES)


class ReferenceKernel(PlainKernel):
    """Attention in float64, in tiles that fit a CPU's caches: slow, to compare fast kernels with.

    The state that it adds to is float32 like everyone's, so it is right to a few 1e-7.
    """

    name = "reference"
    precision = torch.float64
    score_bytes = 1 << 20

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        return sum(self._tile_bytes(group_size, rows, keys, head_dim)) + threads * PRODUCT_BYTES


def _shift(maximum: torch.Tensor, state_maximum: torch.Tensor) -> torch.Tensor:
    """The shift of scores before exp: `state_maximum`, or as near as weights stay finite.

    From scores of about 1e9 on, rounding the maximum to float32 moves it by more than exp can take. The weights of a tile
    are exact all the same; against other tiles the row then counts as float32 scores would.
    """
    finite = finite_shift(maximum)
    return finite - (finite - finite_shift(state_maximum)).clamp_(-_MOST_APART, _MOST_APART)


def _hide(scores: torch.Tensor, intervals: Int32s) -> None:
    """Set scores [g, rows, keys] of keys that a row does not attend to -inf, in place."""
    key = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    a, b, c, d = _on_device(intervals, scores.device).unsqueeze(-1).unbind(1)  # [rows, 1]
    if intervals[:, 0].any():
        scores.masked_fill_(key < a, -math.inf)
    if np.array_equal(intervals[:, 2], intervals[:, 3]):
        scores.masked_fill_(key >= b, -math.inf)
    else:
        for part, start, stop in zip(scores.chunk(2, 1), b.chunk(2), c.chunk(2), strict=True):  # two masks, of half the rows
            part.masked_fill_((key >= start).logical_and_(key < stop), -math.inf)
        scores.masked_fill_(key >= d, -math.inf)


def _weighted_sum(weights: torch.Tensor, value: torch.Tensor, intervals: Int32s | None) -> torch.Tensor:
    """weights [g, rows, keys] @ value [keys, D]; NaN, Inf reach attending rows only."""
    if intervals is None:
        return weights @ value
    finite = value.nan_to_num(0.0, 0.0, 0.0)  # a hidden key's weight is 0, and 0 times NaN or Inf would be NaN
    return (weights @ finite).add_(_sum_not_finite(value, _on_device(intervals, value.device).long()))


def _sum_not_finite(value: torch.Tensor, intervals: torch.Tensor) -> torch.Tensor:
    """The sum of the NaN and Inf that each row attends: [rows, D], else 0."""

    def met(kind: torch.Tensor) -> torch.Tensor:
        before = torch.zeros((len(value) + 1, value.shape[1]), dtype=torch.int32, device=value.device)
        torch.cumsum(kind, 0, dtype=torch.int32, out=before[1:])
        a, b, c, d = intervals.unbind(1)
        return before[b].sub_(before[a]).add_(before[d]).sub_(before[c]) > 0

    nan, above, below = met(value.isnan()), met(value == math.inf), met(value == -math.inf)
    total = torch.zeros(nan.shape, dtype=value.dtype, device=value.device)
    total.masked_fill_(above, math.inf).masked_fill_(below, -math.inf)
    return total.masked_fill_(nan.logical_or_(above.logical_and_(below)), math.nan)


def _on_device(intervals: Int32s, device: torch.device) -> torch.Tensor:
    """The intervals on a device; nothing waits for the copy."""
    tensor = torch.from_numpy(intervals)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
