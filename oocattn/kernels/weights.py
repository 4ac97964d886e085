"""The CPU kernel of second passes: softmax weights whose sums are known, times values of few columns.

Where the log-sum-exp of a row is known, its weights need no running maximum: a tile is one matrix product, from which the
shifts are taken in the product itself, one pass of exp2, and a product with as few columns as values are projected to, and
one of ones, whose sums are the denominators. What was measured on Zen 4 (AVX2, torch 2.13), in nanoseconds of one core for
a pair at D = 64: the products 1.45 and 0.40, exp2 0.56 (exp: 1.4); torch's flash attention 3.8.

* Scores lie [keys, rows]: the other way round, the narrow product takes five times as long.
* exp takes ten times as long where its result is below 2^-126, and on some processors all that meets such numbers: this
  kernel's threads compute with 0 for them.
* A pair that is masked has a weight, whatever it is, whose bits are set to 0 afterwards: torch's operations on booleans
  cost three times as much as on the signs of integers, and 0 times NaN is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from oocattn.denormals import flush_denormals
from oocattn.kernels.intervals import Int32s
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import merge
from oocattn.kernels.plain import PRODUCT_BYTES, add_terms, sum_not_finite
from oocattn.kernels.settings import full_precision
from oocattn.kernels.shares import Share, attend_shares
from oocattn.kernels.state import AttentionState
from oocattn.problem.arrays import DTYPES
from oocattn.problem.bounds import hull
from oocattn.problem.calls import CallSize
from oocattn.problem.second_pass import VECTORS
from oocattn.units import ceil_div

_BLOCK = 256  # rows of a tile over all heads; rows that are apart share fewer keys
_KEYS = 1024  # keys of a tile: its weights, 1 MiB
_BLOCKS = 16  # blocks of a share at most: each tile of keys is made ready once for them
_SHARES = 4  # for each thread, where there are rows enough: under a causal mask some have far more keys than others
_ROW_QUANTUM = 8  # rows of a block are a multiple of it, if more
_LOG2_E = math.log2(math.e)


class WeightsKernel(Kernel):
    """Sums of exp(score - shift), and of these weights times projected values, in float32.

    The error of a weight is that of its score, some 2^-24 of the score's size: 1e-6 where scores are a few tens, 1e-3 where
    they are 1e4. Its bits do not depend on the number of threads that torch gives the calling one. A row whose shift is
    -inf has weights of 0.
    """

    name = "weights"
    shifted = True

    @full_precision(torch.device("cpu"))
    def attend(self, operands: Operands, state: AttentionState) -> None:
        if operands.shift is None or operands.projection is None:
            raise ValueError("operands without shift or projection: expected both, as of a second pass")
        operands.check(state)
        if operands.rows == 0 or operands.keys == 0:
            return

        def attend_share(share: Share) -> None:
            own = state.rows(share.rows.start, share.rows.stop)
            with flush_denormals():
                _ShareCall(operands, share, own).attend()

        attend_shares(_make_shares(operands, torch.get_num_threads()), attend_share, one_core=True)

    def scratch_bytes(self, call: CallSize) -> int:
        step = _block_rows(call.group_size)
        rows, keys = min(step, call.rows), min(call.keys, _KEYS)
        columns, blocks = call.group_size * rows, ceil_div(min(call.rows, _BLOCKS * step), rows) if rows else 0
        of_blocks = blocks * columns * (call.head_dim + 3 + VECTORS) + 5 * blocks * rows
        loading = 2 * columns * call.head_dim + keys * (call.head_dim + 1 + call.value_dim)
        projected = 4 * keys * (VECTORS + 1) + 4 * columns * VECTORS
        hiding = 3 * rows * keys
        terms = 0 if call.plain else rows * keys + 8 * columns
        of_share = 4 * (columns * keys + of_blocks + loading + projected + hiding + terms)
        return call.threads * (of_share + PRODUCT_BYTES)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        return "it runs on CPUs" if device.type != "cpu" else unsupported_dtype(dtype, DTYPES)


@dataclass(frozen=True)
class _Block:
    """Rows that have their tiles in common, and their sums so far.

    `bounds` [rows, 4] are the keys that each attends (None: all), `live` those that any does, and each of `whole` has keys
    that all do. `query` [D + 1, g rows] is scaled, its last row added to the scores; `total` is [W + 1, g rows].
    """

    rows: range
    bounds: Int32s | None
    live: list[range]
    whole: list[range]
    query: torch.Tensor
    total: torch.Tensor

    def parts(self, keys: range) -> list[range]:
        """The keys of a tile that any row attends."""
        return [part for run in self.live if (part := _common(run, keys))]

    def unlike(self, keys: range) -> list[range]:
        """Those of some keys that not every row may attend: at either end."""
        whole = max((_common(run, keys) for run in self.whole), key=len)
        ends = [range(keys.start, whole.start), range(whole.stop, keys.stop)] if whole else [keys]
        return [end for end in ends if end]

    def bounds_within(self, keys: range) -> Int32s:
        """The bounds [rows, 4] relative to the first of some keys."""
        found = np.array([[0, len(keys), 0, 0]], np.int32) if self.bounds is None else self.bounds - np.int32(keys.start)
        return found.clip(0, len(keys)).repeat(len(self.rows) // len(found), 0)


class _ShareCall:
    """Rows of a call that one thread attends: each tile of keys is made ready once, and met by one block after another."""

    def __init__(self, operands: Operands, share: Share, state: AttentionState) -> None:
        assert operands.projection is not None
        self.operands, self.share, self.state = operands, share, state
        self.group_size, _, self.head_dim = operands.query.shape
        self.projection = operands.projection.T.clone()
        step, most = _block_rows(self.group_size), min(operands.keys, _KEYS)
        self.weights = _empty(most * self.group_size * min(step, len(share.rows)))
        self.key = _empty(most, self.head_dim + 1)
        self.key[:, self.head_dim] = 1.0  # times the last row of a block's query
        self.value = _empty(most, operands.value.shape[1])
        self.projected = _empty(len(self.projection) + 1, most)
        self.projected[-1] = 1.0  # for the denominators
        rows = share.rows
        self.blocks = [self._block(range(row, min(row + step, rows.stop))) for row in rows[::step]]

    def attend(self) -> None:
        """Add what the rows attend to their state."""
        keys, told = self.share.keys, self.operands.attended
        for first in range(keys.start - keys.start % _KEYS, keys.stop, _KEYS):  # tiles that do not depend on the share
            tile = range(first, min(first + _KEYS, self.operands.keys))
            parts = [(block, part) for block in self.blocks for part in block.parts(tile)]
            if not parts:
                continue
            is_finite = self._load(tile)
            pairs = sum(self._attend(block, part, part.start - first, is_finite) for block, part in parts)
            if told is not None:
                told(pairs)
        for block in self.blocks:
            self._finish(block)

    def _block(self, rows: range) -> _Block:
        operands, columns = self.operands, self.group_size * len(rows)
        total = torch.zeros((len(self.projected), columns), dtype=torch.float32, device="cpu")
        query = _empty(self.head_dim + 1, columns)
        scaled = operands.query[:, rows.start : rows.stop].double()  # a factor rounded to float32 would move all scores
        scaled.mul_(operands.scores.scale * self._unit)
        query[:-1].view(self.head_dim, *scaled.shape[:2]).copy_(scaled.movedim(2, 0))
        query[-1] = self._added(rows).flatten()
        if operands.intervals is None:
            every = [range(operands.keys)]
            return _Block(rows, None, every, every, query, total)
        bounds = operands.intervals.bounds.part(rows).values().astype(np.int32)
        most, least = bounds.max(0).tolist(), bounds.min(0).tolist()
        whole = [range(most[0], least[1]), range(most[2], least[3])]
        return _Block(rows, bounds, operands.intervals.live_keys(rows), whole, query, total)

    @property
    def _unit(self) -> float:
        """The factor that makes plain scores exponents of 2; those with terms get it last."""
        return _LOG2_E if self.operands.is_plain else 1.0

    def _added(self, rows: range) -> torch.Tensor:
        """What is added to the scores of rows so that they are shifted: float64 [g, rows]."""
        assert self.operands.shift is not None
        shift = self.operands.shift[:, rows.start : rows.stop].double()
        return shift.masked_fill_(shift == -math.inf, math.inf).mul_(-self._unit)  # without keys, weights are 0

    def _load(self, tile: range) -> bool:
        """Make keys and values of a tile ready; return whether the projected values are finite."""
        of_keys, count = slice(tile.start, tile.stop), len(tile)
        self.key[:count, :-1].copy_(self.operands.key[of_keys])
        self.value[:count].copy_(self.operands.value[of_keys])
        projected = self.projected[:-1, :count]
        torch.mm(self.projection, self.value[:count].T, out=projected)
        return math.isfinite(float(projected.sum()))

    def _attend(self, block: _Block, keys: range, first: int, is_finite: bool) -> int:
        """Add keys, of the tile from `first` on, to the sums of a block; return the pairs that it attends."""
        weights, projected = self._weights(block, keys, first), self.projected[:, first : first + len(keys)]
        pairs = len(block.rows) * len(keys)
        for part in block.unlike(keys):
            bounds = block.bounds_within(part)
            of_heads = weights[part.start - keys.start : part.stop - keys.start].unflatten(1, (self.group_size, -1))
            _clear_hidden(of_heads, bounds)
            pairs -= len(block.rows) * len(part) - int((bounds[:, 1::2] - bounds[:, ::2]).sum())
        if not is_finite:
            met = sum_not_finite(projected[:-1].T, torch.from_numpy(block.bounds_within(keys)).long())  # [rows, W]
            block.total[:-1].unflatten(1, (self.group_size, -1)).add_(met.T.unsqueeze(1))
            projected = projected.nan_to_num(0.0, 0.0, 0.0)
        block.total.addmm_(projected, weights)
        return pairs

    def _weights(self, block: _Block, keys: range, first: int) -> torch.Tensor:
        """Weights [keys, g rows] as if every row attended all of some keys, of the tile from `first` on."""
        key, shape = self.key[first : first + len(keys)], (self.group_size, len(block.rows), len(keys))
        taken = self.weights[: math.prod(shape)]
        if self.operands.is_plain:
            weights = taken.view(len(keys), -1)
            return torch.mm(key, block.query, out=weights).exp2_()
        scores = taken.view(shape)
        torch.mm(block.query[:-1].T, key[:, :-1].T, out=taken.view(-1, len(keys)))
        less = add_terms(scores, self.operands.part(block.rows, keys))
        added = self._added(block.rows)
        scores.add_((added if less is None else added - less).float().unsqueeze(-1))
        return scores.mul_(_LOG2_E).exp2_().view(-1, len(keys)).T

    def _finish(self, block: _Block) -> None:
        """Add the sums of a block to the state."""
        added = self._added(block.rows)
        rounding = (added - added.float()).nan_to_num_(0.0)
        factor = torch.exp2(rounding).float()  # what the shift has lost in float32
        total = block.total.unflatten(1, (self.group_size, -1)).mul_(factor)  # [W + 1, g, rows]
        maximum = torch.zeros_like(factor)
        if block.bounds is not None:
            counts = torch.from_numpy((block.bounds[:, 1::2] - block.bounds[:, ::2]).sum(1))
            maximum.masked_fill_(counts == 0, -math.inf)
        first = self.share.rows.start
        state = self.state.rows(block.rows.start - first, block.rows.stop - first)
        merge(state, AttentionState.without_ledger(total[:-1].movedim(0, 2), total[-1], maximum))


def _clear_hidden(weights: torch.Tensor, bounds: Int32s) -> None:
    """Set weights [keys, g, rows] of keys that a row does not attend to 0, in place."""
    key = torch.arange(len(weights), dtype=torch.int32, device="cpu").unsqueeze(-1)
    a, b, c, d = torch.from_numpy(np.ascontiguousarray(bounds.T))

    def within(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Negative where a key is: int32 [keys, rows]."""
        found = key - stop
        return found.bitwise_and_((start - 1) - key) if start.any() else found

    attended = within(c, d)
    if (a < b).any():
        attended.bitwise_or_(within(a, b))
    weights.view(torch.int32).bitwise_and_(attended.bitwise_right_shift_(31).unsqueeze(1))  # all bits, or none


def _make_shares(operands: Operands, threads: int) -> list[Share]:
    """Blocks of rows that are attended together; those with most work come first."""
    step = _block_rows(len(operands.query))
    blocks = ceil_div(operands.rows, step)
    step *= min(_BLOCKS, max(1, blocks // (threads * _SHARES)) if threads > 1 else blocks)
    shares = [_share(operands, range(row, min(row + step, operands.rows))) for row in range(0, operands.rows, step)]
    return sorted(shares, key=lambda share: -share.pairs)


def _share(operands: Operands, rows: range) -> Share:
    if operands.intervals is None:
        return Share(rows, range(operands.keys), len(rows) * operands.keys)
    bounds = operands.intervals.bounds.part(rows)
    live = bounds.live_keys()
    return Share(rows, hull(live) if live else range(0), int(bounds.pairs().sum()))


def _block_rows(group_size: int) -> int:
    """Rows of a block."""
    rows = max(1, _BLOCK // group_size)
    return rows - rows % _ROW_QUANTUM if rows > _ROW_QUANTUM else rows


def _common(left: range, right: range) -> range:
    """The numbers of both ranges."""
    return range(max(left.start, right.start), min(left.stop, right.stop))


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
