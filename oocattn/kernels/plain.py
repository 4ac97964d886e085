"""Attention in plain torch operations, tile by tile, wherever torch runs: in float32, and the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from oocattn.kernels.cuda.device import allocated_bytes, capability_reason
from oocattn.kernels.intervals import Int32s
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import SCRATCH_BYTES, finite_shift, merge
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.problem.arrays import DTYPES
from oocattn.problem.calls import CallSize
from oocattn.units import round_up

_CUBLAS_WORKSPACE = 32 << 20  # bytes that torch keeps for cuBLAS: 32 MiB on Hopper, less on others
PRODUCT_BYTES = 3 << 20  # bytes of the CPU's matrix products per thread; measured: 1.7 to 2.8 MiB (MKL)
_MOST_APART = 40.0  # the most that a row's shift may lie from its maximum: weights reach exp(40)

_LEAST_EXPONENT, _LEAST_WEIGHT = -87.0, 1.7e-38  # exp of the first is 1.65e-38, still a normal float32

_PRODUCTS = 8  # matrix products at once; with 2 bits still depended on the number of threads where D = 1,024
_LEAST_ROWS = 2  # of a product: on some processors the bits of a single row depend on where its operands lie
_QUANTUM = 64  # steps above it are cut to a multiple, which suits the matrix products
_MASKED_ROWS = 512  # rows of a tile where a mask is no triangle: keys up to so far from those of a row are computed


class PlainKernel(Kernel):
    """Attention as matrix products in float32 without TF32; merged in float32.

    NaN and Inf reach the rows that attend them and no others, also within the tiles whose rows attend different keys.
    Everything is launched on torch's current stream and nothing waits for it. It serves any intervals and terms, also for
    the other kernels of its device.
    """

    name = "torch"
    precision = torch.float32
    score_bytes = 64 << 20
    """Bytes of the scores of one tile."""
    flat = False
    """True if every tile has few rows, not only under masks that are no triangles."""

    def attend(self, operands: Operands, state: AttentionState) -> None:
        operands.check(state)
        with full_precision(operands.query.device):
            before = range(0)
            for rows, keys in self.tiles(operands):
                if rows != before:
                    operands.tell_rows(before)
                    before = rows
                self._attend_tile(operands.part(rows, keys), state.rows(rows.start, rows.stop))

    def tiles(self, operands: Operands) -> Iterator[tuple[range, range]]:
        """Rows and keys of the tiles that have attended pairs."""
        band = operands.band
        masked = band is None or not band.is_open_below(operands.rows)
        row_step, key_step = self._steps(len(operands.query), masked, max(operands.query.shape[2], operands.value.shape[1]))
        for first in range(0, operands.rows, row_step):
            rows = range(first, min(first + row_step, operands.rows))
            live = [range(operands.keys)] if operands.intervals is None else operands.intervals.live_keys(rows)
            for run in live:
                for key in range(run.start, run.stop, key_step):
                    yield rows, range(key, min(key + key_step, run.stop))

    def _attend_tile(self, tile: Operands, state: AttentionState) -> None:
        intervals = None if tile.intervals is None or tile.intervals.is_full else tile.intervals.values()
        query, key, value = (tensor.to(self.precision) for tensor in (tile.query, tile.key, tile.value))
        scores = self._product(query * tile.scores.scale, key.T)  # [g, rows, keys]
        less = add_terms(scores, tile)
        if intervals is not None:
            _hide(scores, intervals)
        maximum = scores.amax(-1)
        kept = (maximum if less is None else maximum - less).float()  # as the state holds it
        shift = _shift(maximum, kept if less is None else (kept + less).to(maximum.dtype))
        weights = self._exp(scores.sub_(shift.unsqueeze(-1)))
        num = self._weighted_sum(weights, value, intervals)
        merge(state, AttentionState.without_ledger(num.float(), weights.sum(-1).float(), kept))

    def scratch_bytes(self, call: CallSize) -> int:
        return allocated_bytes(*self._tile_bytes(call)) + _CUBLAS_WORKSPACE

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        return unsupported_dtype(dtype, DTYPES) or ("" if device.type == "cpu" else capability_reason(device))

    def _exp(self, scores: torch.Tensor) -> torch.Tensor:
        """The weights of shifted scores, in place."""
        return scores.exp_()

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """left [g, rows, n] @ right [n, columns]."""
        return left @ right

    def _weighted_sum(self, weights: torch.Tensor, value: torch.Tensor, intervals: Int32s | None) -> torch.Tensor:
        """weights [g, rows, keys] @ value [keys, Dv]; NaN, Inf reach attending rows only."""
        if intervals is None or (value.device.type == "cpu" and math.isfinite(float(value.sum()))):
            return self._product(weights, value)
        finite = value.nan_to_num(0.0, 0.0, 0.0)  # a hidden key's weight is 0, and 0 times NaN or Inf would be NaN
        return self._product(weights, finite).add_(sum_not_finite(value, _on_device(intervals, value.device).long()))

    def _steps(self, group_size: int, masked: bool, columns: int) -> tuple[int, int]:
        """Rows and keys of a tile, over all heads as many scores as score_bytes holds."""
        most = self.score_bytes // self.precision.itemsize // group_size
        step = max(1, math.isqrt(most))
        step -= step % _QUANTUM if step > _QUANTUM else 0
        if not (masked or self.flat) or step <= _MASKED_ROWS:
            return step, step
        keys = min(most // _MASKED_ROWS, max(step, self.score_bytes // self.precision.itemsize // columns))
        return _MASKED_ROWS, keys - keys % _QUANTUM

    def _tile_bytes(self, call: CallSize) -> tuple[int, ...]:
        """Sizes of a tile's tensors: scores, terms, masks, operands, numerators, vectors, merge."""
        itemsize, group_size, columns = self.precision.itemsize, call.group_size, max(call.head_dim, call.value_dim)
        row_step, key_step = self._steps(group_size, call.masked, columns)
        rows, keys = min(call.rows, row_step), min(call.keys, key_step)
        of_query = group_size * rows * columns * itemsize  # cast and scaled; later the numerator, also as float32
        of_value = keys * columns * itemsize  # key; value, and what is finite of it
        counted = (keys + 1) * columns * 4, *[rows * columns * 4] * 2, 4 * rows * columns, rows * columns * itemsize
        vectors = 8 * group_size * rows * itemsize + rows * 16 * (4 + 1)
        scores = group_size * rows * keys * itemsize
        distances, biases, far = rows * keys * itemsize, group_size * keys * itemsize, 4 * group_size * rows * 8
        terms = () if call.plain else (distances, biases, far)
        return (scores, *terms, (rows + 1) * keys, *[of_query] * 2, *[of_value] * 3, *counted, vectors, SCRATCH_BYTES)


class CachedKernel(PlainKernel):
    """The same in tiles that fit a CPU's caches, for calls that no library takes.

    Its bits do not depend on the number of threads: of a single product these may divide the sums among them, of several at
    once each does its own.
    """

    score_bytes = 2 << 20
    flat = True

    def scratch_bytes(self, call: CallSize) -> int:
        sizes = self._tile_bytes(call)
        return sum(sizes) + sizes[0] + call.threads * PRODUCT_BYTES

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        group_size, rows, inner = left.shape
        count = group_size * rows
        padded = max(_LEAST_ROWS * _PRODUCTS, round_up(count, _PRODUCTS))
        filled = pad(left.reshape(count, inner), (0, 0, 0, padded - count)) if padded > count else left
        found = torch.bmm(filled.reshape(_PRODUCTS, -1, inner), right.expand(_PRODUCTS, -1, -1))
        return found.view(-1, right.shape[1])[:count].view(group_size, rows, -1)

    def _exp(self, scores: torch.Tensor) -> torch.Tensor:
        # Scores of -inf take exp eight times as long, and numbers below 2^-126 exp and products a hundred times.
        return torch.threshold_(scores.clamp_(min=_LEAST_EXPONENT).exp_(), _LEAST_WEIGHT, 0.0)


class ReferenceKernel(PlainKernel):
    """Attention in float64, in tiles that fit a CPU's caches: slow, to compare fast kernels with.

    The state that it adds to is float32 like everyone's, so it is right to a few 1e-7.
    """

    name = "reference"
    precision = torch.float64
    score_bytes = 1 << 20

    def scratch_bytes(self, call: CallSize) -> int:
        return sum(self._tile_bytes(call)) + call.threads * PRODUCT_BYTES


def add_terms(scores: torch.Tensor, tile: Operands) -> torch.Tensor | None:
    """Apply softcap, slopes and bias to scaled scores [g, rows, keys], in place; return what they are then too high by.

    That is ALiBi's term of the tile's key next to each row, float64 [g, rows], or None. It may be far larger than what tells
    the row's keys apart, which float32 would lose in the sum.
    """
    cap, less = tile.scores.softcap, None
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    if tile.slopes is not None:
        assert tile.intervals is not None
        position = tile.intervals.positions()
        nearest = position.clip(0, scores.shape[-1] - 1)
        key = torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        distance = (_on_device(nearest, scores.device).to(scores.dtype).unsqueeze(-1) - key).abs_()
        for of_head, slope in zip(scores, tile.slopes, strict=True):
            of_head.sub_(distance, alpha=slope)
        apart = np.abs(position - nearest)
        if apart.any():
            less = _on_device(np.outer(np.array(tile.slopes, np.float64), apart), scores.device)
    if tile.key_bias is not None:
        scores.add_(tile.key_bias.to(scores.dtype).unsqueeze(1))
    return less


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


def sum_not_finite(value: torch.Tensor, intervals: torch.Tensor) -> torch.Tensor:
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


def _on_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Numbers of rows on a device; nothing waits for the copy."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
