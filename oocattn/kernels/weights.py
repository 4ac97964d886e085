"""The CPU kernel of second passes: softmax weights whose sums are known, times values of few columns.

Where the log-sum-exp of a row is known, its weights need no running maximum: a tile is one matrix product, from which the
shifts are taken in the product itself, one pass of exp2, and a product with as few columns as values are projected to, and
one of ones, whose sums are the denominators. What was measured on Zen 4 (AVX2, torch 2.13), in nanoseconds of one core for
a pair at D = 64: the products 1.45 and 0.40, exp2 0.56 (exp: 1.4); torch's flash attention 3.8.

* Scores lie [keys, rows]: the other way round, the narrow product takes five times as long.
* exp takes ten times as long where its result is below 2^-126, and on some processors all that meets such numbers: this
  kernel's threads compute with 0 for them.
* Values are projected once for all rows, some 64K keys at a time, and threads that sum nothing over rows never wait for each
  other: 32K causal tokens of 4 heads, D = 64, take two threads 2.7 s, not 3.0 (Zen 4; the run 3.9).
* A pair that is masked has a weight, whatever it is, whose bits are set to 0 afterwards: torch's operations on booleans
  cost three times as much as on the signs of integers, and 0 times NaN is NaN.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from oocattn.denormals import flush_denormals
from oocattn.kernels.blocks import Block, make_blocks
from oocattn.kernels.intervals import Int32s
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import merge
from oocattn.kernels.own_tensors import own_tensor
from oocattn.kernels.plain import PRODUCT_BYTES, add_terms, sum_not_finite
from oocattn.kernels.projected import MOST_TILES, TILE_KEYS, Projected, projected_together
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import KeySums, RowSums, WeightTile, merge_reduced
from oocattn.kernels.settings import full_precision
from oocattn.kernels.shares import attend_shares
from oocattn.kernels.state import AttentionState
from oocattn.problem.arrays import DTYPES
from oocattn.problem.bounds import hull
from oocattn.problem.calls import CallSize
from oocattn.problem.second_pass import VECTORS
from oocattn.threads import InOrder
from oocattn.units import ceil_div

_BLOCK = 256  # rows of a tile over all heads; rows that are apart share fewer keys
_BLOCKS = 16  # blocks of a share at most: each tile of keys is made ready once for them
_SUMMED_BLOCKS = 4  # of a share where weights are summed over rows as well
_SHARES = 4  # for each thread, where there are rows enough: under a causal mask some have far more keys than others
_ROW_QUANTUM = 8  # rows of a block are a multiple of it, if more
_WORTH = 32768  # pairs of all heads that take as long as a block does besides its pairs: 0.1 ms
_LOG2_E = math.log2(math.e)


class WeightsKernel(Kernel):
    """Sums of exp(score - shift), and of these weights times projected values or what reductions make of them, in float32.

    A weight is as exact as its score is in float32: to sqrt(D) 2^-25 times the score's size (standard deviation, at most),
    measured at D = 64: 1.6e-6 where scores reach 30, and 1.3e-3 where they are 1e4. Its bits do not depend on
    the number of threads that torch gives the calling one. A row whose shift is -inf has weights of 0.
    """

    name = "weights"
    shifted = True

    @full_precision(torch.device("cpu"))
    def attend(self, operands: Operands, state: AttentionState) -> None:
        if operands.shift is None or (operands.projection is None) == (operands.reducing is None):
            raise ValueError("expected operands of a second pass: with a shift, and either a projection or what is reduced")
        operands.check(state)
        if operands.rows == 0 or operands.keys == 0:
            return
        for part in projected_together(operands):
            _attend(part, state)

    def scratch_bytes(self, call: CallSize) -> int:
        step = _block_rows(call.group_size)
        rows, keys = min(step, call.rows), min(call.keys, TILE_KEYS)
        columns, blocks = call.group_size * rows, ceil_div(min(call.rows, _BLOCKS * step), rows) if rows else 0
        of_blocks = blocks * columns * (call.head_dim + 3 + VECTORS) + 5 * blocks * rows
        loading = 2 * columns * call.head_dim + keys * (call.head_dim + 1)
        projected = keys * (VECTORS + 1) + 4 * columns * VECTORS
        tiles = min(ceil_div(call.keys, TILE_KEYS), MOST_TILES)
        of_keys = 4 * keys * (tiles * (VECTORS + 1) + call.value_dim)
        hiding = 3 * rows * keys
        terms = 0 if call.plain else rows * keys + 8 * columns
        of_share = 4 * (columns * keys + of_blocks + loading + projected + hiding + terms)
        return call.threads * (of_share + PRODUCT_BYTES) + of_keys + (_reducing_bytes(call, step) if call.reduced else 0)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        return "it runs on CPUs" if device.type != "cpu" else unsupported_dtype(dtype, DTYPES)


def _attend(operands: Operands, state: AttentionState) -> None:
    """Attend keys whose projected values are held all at a time."""
    in_order, values = InOrder(), Projected.empty(operands)

    def project(projection: torch.Tensor) -> None:
        with flush_denormals():
            values.take(operands.value, projection)

    def attend_share(share: _Share) -> list[KeySums]:
        own = state.rows(share.rows.start, share.rows.stop)
        with flush_denormals(), np.errstate(over="ignore", invalid="ignore"):  # weights of a wrong shift
            return _ShareCall(operands, share, own, values).attend()

    def attend_in_turn(share: _Share) -> None:
        sums = list[KeySums]()
        try:
            sums += attend_share(share)
        finally:
            with in_order.turn(share.turn):
                for each in sums:
                    each.finish()

    if operands.projection is not None:
        attend_shares([operands.projection], project, one_core=True)
    sums_rows = operands.reducing is not None and bool(operands.reducing.sums)
    shares = _make_shares(operands, torch.get_num_threads())
    attend_shares(shares, attend_in_turn if sums_rows else attend_share, one_core=True)


class _Sums(NamedTuple):
    """A block's query [g rows, D + 1], scaled, the last column added to scores; and its sums so far [W + 1, g rows]."""

    block: Block
    query: torch.Tensor
    total: torch.Tensor
    reduced: list[RowSums]


class _Loaded(NamedTuple):
    """Keys of a tile and what is made of them: key [m, D + 1], and the values' projections with a row of ones [W + 1, m]."""

    keys: range
    key: torch.Tensor
    projected: torch.Tensor
    is_finite: bool

    def part(self, keys: range) -> _Loaded:
        """That of some of the keys."""
        if keys == self.keys:
            return self
        of_keys = slice(keys.start - self.keys.start, keys.stop - self.keys.start)
        return _Loaded(keys, self.key[of_keys], self.projected[:, of_keys], self.is_finite)


class _ShareCall:
    """Rows of a call that one thread attends: each tile of keys is made ready once, and met by one block after another."""

    def __init__(self, operands: Operands, share: _Share, state: AttentionState, values: Projected) -> None:
        self.operands, self.share, self.reducing = operands.part(share.rows, range(operands.keys)), share, operands.reducing
        self.told, self.state, self.is_plain = operands.attended, state, operands.is_plain
        self.group_size, _, self.head_dim = operands.query.shape
        self.values, most = values, min(operands.keys, TILE_KEYS)
        self.exponents = self.weights = own_tensor(most * self.group_size * max(map(len, share.blocks)))
        if self.reducing is not None and self.reducing.needs_exponents:
            self.exponents = own_tensor(len(self.weights))
        self.key = own_tensor(most, self.head_dim + 1)
        self.key[:, self.head_dim] = 1.0  # times the last column of a block's query
        self.unit = _LOG2_E if self.is_plain else 1.0  # plain scores are exponents of 2 from the first
        self.masked, self.mask = np.empty((0, 4), np.int32), torch.empty(0, dtype=torch.int32, device="cpu")
        intervals = self.operands.intervals
        self.bounds = None if intervals is None else intervals.values()
        self.added = self._added()
        first = share.rows.start
        self.sums = [self._sums(range(rows.start - first, rows.stop - first)) for rows in share.blocks]
        self.key_sums: list[KeySums] = []
        if self.reducing is not None:
            self.key_sums = [each.begin(self.reducing.places, share.rows) for each in self.reducing.sums]

    def attend(self) -> list[KeySums]:
        """Add what the rows attend to their state; return what is summed over them."""
        live = [run for sums in self.sums for run in sums.block.live]
        first, stop = min((run.start for run in live), default=0), max((run.stop for run in live), default=0)
        for start in range(first - first % TILE_KEYS, stop, TILE_KEYS):  # tiles that do not depend on the share
            tile = range(start, min(start + TILE_KEYS, self.operands.keys))
            parts = [(sums, part) for sums in self.sums for part in sums.block.live_within(tile)]
            if not parts:
                continue
            self._load(tile)
            pairs = sum(self._attend(sums, part) for sums, part in parts)
            if self.told is not None:
                self.told(pairs)
        self._finish()
        return self.key_sums

    def _sums(self, rows: range) -> _Sums:
        operands, of_rows = self.operands, slice(rows.start, rows.stop)
        columns = self.group_size * len(rows)
        total = torch.zeros((self.values.tiles.shape[1], columns), dtype=torch.float32, device="cpu")
        query = own_tensor(columns, self.head_dim + 1)
        of_heads = query.unflatten(0, (self.group_size, -1))
        scaled = operands.query[:, of_rows].double()  # a factor rounded to float32 would move all scores
        of_heads[:, :, :-1].copy_(scaled.mul_(operands.scores.scale * self.unit))
        of_heads[:, :, -1].copy_(self.added[:, of_rows])
        bounds = None if self.bounds is None else self.bounds[of_rows]
        begun: list[RowSums] = []
        if (reducing := self.reducing) is not None:
            begun = [each.begin(self.group_size, len(rows), reducing.places.key_tokens) for each, _ in reducing.rows]
        return _Sums(Block.of(rows, operands.keys, bounds), query, total, begun)

    def _added(self) -> torch.Tensor:
        """What is added to scores so that they are shifted: float64 [g, rows]."""
        assert self.operands.shift is not None
        shift = self.operands.shift.double()
        return shift.masked_fill_(shift == -math.inf, math.inf).mul_(-self.unit)  # without keys, weights are 0

    def _load(self, tile: range) -> None:
        """Make the keys of a tile ready."""
        key, number = self.key[: len(tile)], tile.start // TILE_KEYS
        key[:, :-1].copy_(self.operands.key[tile.start : tile.stop])
        self.loaded = _Loaded(tile, key, self.values.tiles[number, :, : len(tile)], self.values.is_finite[number])

    def _attend(self, sums: _Sums, keys: range) -> int:
        """Add some keys of the tile to the sums of a block; return the pairs that it attends."""
        (block, query, total, _), (_, key, projected, is_finite) = sums, self.loaded.part(keys)
        exponents = self._plain_scores(query, key) if self.is_plain else self._scores_with_terms(sums, key, keys)
        weights: torch.Tensor = torch.exp2(exponents, out=_laid_out(self.weights, exponents))
        pairs = len(block.rows) * len(keys)
        for part in block.partial(keys):
            bounds = block.bounds_within(part)
            for hidden in (weights, exponents) if self.exponents is not self.weights else (weights,):
                self._clear_hidden(hidden[part.start - keys.start : part.stop - keys.start], bounds)
            pairs -= len(block.rows) * len(part) - int((bounds[:, 1::2] - bounds[:, ::2]).sum())
        if not is_finite:
            met = sum_not_finite(projected[:-1].T, torch.from_numpy(block.bounds_within(keys)).long())  # [rows, W]
            total[:-1].unflatten(1, (self.group_size, -1)).add_(met.T.unsqueeze(1))
            projected = projected.nan_to_num(0.0, 0.0, 0.0)
        if self.reducing is None:
            total.addmm_(projected, weights)
        else:
            total.add_(weights.sum(0))
            self._reduce(sums, WeightTile(weights, exponents, self.group_size, block.rows, keys))
        return pairs

    def _reduce(self, sums: _Sums, tile: WeightTile) -> None:
        """Have a tile of weights of a block reduced."""
        of_call = range(self.share.rows.start + tile.rows.start, self.share.rows.start + tile.rows.stop)
        for each in self.key_sums:
            each.add(replace(tile, rows=of_call))
        for reduced in sums.reduced:
            reduced.add(tile)

    def _plain_scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Logarithms to the base 2 of weights [keys, g rows] as if every row attended all of some keys."""
        shape = len(key), len(query)
        found: torch.Tensor = torch.mm(key, query.T, out=self.exponents.as_strided(shape, (len(query), 1)))
        return found

    def _scores_with_terms(self, sums: _Sums, key: torch.Tensor, keys: range) -> torch.Tensor:
        """The same of scores with terms; beside these it does not matter that the narrow product is slower."""
        query, rows = sums.query, sums.block.rows
        products = self.exponents.as_strided((len(query), len(key)), (len(key), 1))
        scores: torch.Tensor = torch.mm(query[:, :-1], key[:, :-1].T, out=products).unflatten(0, (self.group_size, -1))
        less = add_terms(scores, self.operands.part(rows, keys))
        added = self.added[:, rows.start : rows.stop]
        scores.add_((added if less is None else added - less).float().unsqueeze(-1))
        return scores.mul_(_LOG2_E).flatten(0, 1).T

    def _clear_hidden(self, weights: torch.Tensor, bounds: Int32s) -> None:
        """Set weights [keys, g rows] of keys that a row does not attend to 0, in place."""
        if len(weights) != len(self.mask) or not np.array_equal(bounds, self.masked):  # along a diagonal they are the same
            self.masked, self.mask = bounds, _bit_mask(len(weights), bounds)
        bits = weights.view(torch.int32).unflatten(1, (self.group_size, -1))
        bits.bitwise_and_(self.mask.unsqueeze(1))

    def _finish(self) -> None:
        """Add the sums of all blocks to the state."""
        total = torch.cat([sums.total.unflatten(1, (self.group_size, -1)) for sums in self.sums], 2)
        lost = torch.exp2((self.added - self.added.float()).nan_to_num_(0.0))  # of the shifts, in float32
        total.mul_(lost.float())  # [W + 1, g, rows]
        maximum = torch.zeros_like(total[-1])
        if self.bounds is not None:
            counts = torch.from_numpy((self.bounds[:, 1::2] - self.bounds[:, ::2]).sum(1))
            maximum.masked_fill_(counts == 0, -math.inf)
        if self.reducing is None:
            merge(self.state, AttentionState.without_ledger(total[:-1].movedim(0, 2), total[-1], maximum))
        else:
            found = AttentionState.without_ledger(self._columns(lost), total[-1], maximum)
            merge_reduced(self.reducing.rows, self.state, found)

    def _columns(self, factor: torch.Tensor) -> torch.Tensor:
        """The columns of all reductions along keys: [g, rows, columns]."""
        found = []
        for sums in self.sums:
            of_rows = factor[:, sums.block.rows.start : sums.block.rows.stop]
            columns = [each.columns(of_rows) for each in sums.reduced]
            found.append(torch.cat(columns or [torch.zeros((*of_rows.shape, 1), dtype=torch.float32, device="cpu")], 2))
        return torch.cat(found, 1)


def _bit_mask(keys: int, bounds: Int32s) -> torch.Tensor:
    """All bits of keys that a row attends, none of others: int32 [keys, rows]."""
    key = torch.arange(keys, dtype=torch.int32, device="cpu").unsqueeze(-1)

    def within(start: Int32s, stop: Int32s) -> torch.Tensor:
        """Negative where a key is."""
        found = key - torch.from_numpy(stop)
        return found.bitwise_and_(torch.from_numpy(start - 1) - key) if start.any() else found

    a, b, c, d = bounds.T.copy()
    attended = within(c, d)
    if (a < b).any():
        attended.bitwise_or_(within(a, b))
    return attended.bitwise_right_shift_(31)


def _laid_out(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape and layout at the beginning of some memory."""
    return memory.as_strided(like.shape, like.stride())


class _Share(NamedTuple):
    """Consecutive blocks of rows that a thread attends; `turn` is its place in the order of all."""

    blocks: list[range]
    turn: int

    @property
    def rows(self) -> range:
        return hull(self.blocks)


def _make_shares(operands: Operands, threads: int) -> list[_Share]:
    """The shares of a call; the last rows, which attend most keys under a causal mask, come first."""
    group_size = len(operands.query)
    blocks = make_blocks(operands.rows, operands.intervals, _block_rows(group_size), _WORTH // group_size)
    most = _BLOCKS if threads == 1 else min(_BLOCKS, max(1, len(blocks) // (threads * _SHARES)))
    if operands.reducing is not None:  # whose sums would depend on the number of threads
        most = _SUMMED_BLOCKS
    parts = [blocks[first : first + most] for first in range(0, len(blocks), most)][::-1]
    return [_Share(part, turn) for turn, part in enumerate(parts)]


def _reducing_bytes(call: CallSize, block_rows: int) -> int:
    """Bytes that reductions take besides the sums of weights."""
    rows, keys = min(block_rows, call.rows), min(call.keys, TILE_KEYS)
    columns = call.group_size * rows
    along_keys, along_rows = reductions_of(call.reduced)
    of_rows = sum(width for _, width in along_keys)
    of_share = 4 * columns * (2 * keys + 16 * _SUMMED_BLOCKS * (1 + of_rows)) + 16 * keys
    of_share += sum(each.scratch_bytes(columns, keys) for each, _ in along_keys)
    return call.threads * of_share + sum(each.scratch_bytes(call, _SUMMED_BLOCKS * rows) for each in along_rows)


def _block_rows(group_size: int) -> int:
    """Rows of a block."""
    rows = max(1, _BLOCK // group_size)
    return rows - rows % _ROW_QUANTUM if rows > _ROW_QUANTUM else rows
