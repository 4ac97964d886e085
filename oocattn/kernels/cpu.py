"""The CPU kernel: torch's flash attention on float32 tiles, merged in float32.

The library call is `aten::_scaled_dot_product_flash_attention_for_cpu`, in PyTorch's
aten/src/ATen/native/cpu/FlashAttentionKernel.cpp. It takes rectangles and triangles, into which `shapes` cuts what rows
attend, and which `runs` puts together. What it gets wrong is kept away from it:

* Keys and values must have as many columns: the fewer are filled up with zeros.
* No query or no key kills the process, an innermost stride other than 1 gives wrong numbers, and 16-bit inputs cost
  accuracy: what is not float32, contiguous and on a cache line is first copied into scratch that is.
* Its bits depend on the number of threads, for the matrix products of a single block of rows are divided among them, and on
  operands off a cache line: a call has never fewer than `_ROW_QUANTUM` rows, and every tile starts on a cache line.
* The log-sum-exp of a row whose scores are all large, as of padding masked by -1e9, has lost how many keys it stands for:
  where one exceeds `_LARGEST_LSE`, the call is made again by the reference.
* A row whose scores are all -inf comes back as (out 0, lse 0), and a NaN or Inf in a masked value reaches the rows that
  mask it: calls that may meet them go to the reference.
* A causal call on one head divides its rows, not its work, among the threads, and computes masked keys too: triangles are
  halved recursively into rectangles and triangles small enough to be level. Of packed documents, each thread has its own
  (`shares`), in calls on one core.

Scores with terms, and windows of a few keys, are attended in explicit matrix products (`plain.CachedKernel`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import SCRATCH_BYTES
from oocattn.kernels.plain import PRODUCT_BYTES, CachedKernel, ReferenceKernel
from oocattn.kernels.runs import Limits, Run, make_runs
from oocattn.kernels.settings import full_precision
from oocattn.kernels.shapes import Part, Shape, Sizes, make_parts, narrowest_window
from oocattn.kernels.shares import Share, attend_shares, make_shares
from oocattn.kernels.state import AttentionState
from oocattn.problem.arrays import DTYPES
from oocattn.problem.calls import CallSize
from oocattn.problem.mask import Mask
from oocattn.units import round_up

# Tiles. The rates are of 2 cores (Zen 4, torch 2.13) on float32, D = 64, where no tile above 1,024 x 1,024 differs by
# more than 5%: 158 to 169 GFLOP/s (D = 32: 134 to 140; D = 128: 171 to 185).
_KEY_TILE = 8192  # keys of one library call: 4 MiB of K and V at D = 64, and merging costs 0.2% of the call
_ROW_TILE = 4096  # rows of one library call over all heads: blocks enough for 16 threads
_ROW_TILE_PER_HEAD = 1024  # and at least: below 768 rows the library takes blocks of 64 rows, 6% slower
_ROW_QUANTUM = 64  # rows are padded to two blocks of 32, the library's smallest, or more
_TRIANGLE = 512  # rows of the triangles that are left: 8 equal blocks of 64 rows, each of 512 keys, masked or not
_WINDOW_BLOCKS = (64, 128, 256, 512, 1024)  # rows of a block of a window, of more keys: of a window, its largest block
_LARGEST_LSE = 1024.0  # beyond it, float32 keeps less than 14 bits of what a log-sum-exp says of the number of keys
_LIBRARY_BLOCK = (256, 512)  # rows and keys of the score block that each thread of the library call allocates
_CACHE_LINE = 64  # bytes
_SIZES = Sizes(_KEY_TILE, _TRIANGLE, _TRIANGLE, _WINDOW_BLOCKS)
_SIZES_ON_ONE_CORE = _SIZES._replace(triangle=_ROW_TILE)  # no thread waits for the rows with most keys


class CpuKernel(Kernel):
    """Flash attention on the CPU. Its bits do not depend on the number of threads that torch gives the calling one."""

    name = "cpu"

    @full_precision(torch.device("cpu"))
    def attend(self, operands: Operands, state: AttentionState) -> None:
        operands.check(state)
        rows, keys, intervals = operands.rows, operands.keys, operands.intervals
        if rows == 0 or keys == 0:
            return
        if not operands.is_plain or _is_narrow(intervals):
            CachedKernel().attend(operands, state)
            return
        most, scale = _largest_product(operands), operands.scores.scale
        if not most * max(1.0, scale) < torch.finfo(torch.float32).max:
            ReferenceKernel().attend(operands, state)
            return
        may_be_large = most * scale + math.log(keys) > _LARGEST_LSE
        if intervals is None or len(intervals.bounds.start) == 1:
            _Call(operands, state, may_be_large).attend_all(_SIZES)
            return

        def attend_share(share: Share) -> None:
            own = state.rows(share.rows.start, share.rows.stop)
            _Call(operands.part(share.rows, share.keys), own, may_be_large).attend_all(_SIZES_ON_ONE_CORE)
            if operands.attended is not None:
                operands.attended(share.pairs)

        attend_shares(make_shares(intervals, _tile_rows(len(operands.query), rows)), attend_share)

    def scratch_bytes(self, call: CallSize) -> int:
        tile_rows, columns = call.group_size * _tile_rows(call.group_size, call.rows), max(call.head_dim, call.value_dim)
        tiles = tile_rows * columns + 2 * min(call.keys, _KEY_TILE) * columns
        result = tile_rows * (columns + 1)
        at_once = call.threads if call.masked else 1  # shares of documents
        block_rows, block_keys = _LIBRARY_BLOCK
        library = call.threads * (4 * block_rows * (block_keys + columns + 2) + PRODUCT_BYTES)
        others = ReferenceKernel().scratch_bytes(call)
        if call.masked or not call.plain:
            library += at_once * 4 * _TRIANGLE**2  # a mask of upper triangles
            others = max(others, CachedKernel().scratch_bytes(call))
        beside = max(SCRATCH_BYTES, 4 * tile_rows)
        if call.masked:  # a share may have to go to the reference, by itself
            share = replace(call, rows=min(call.rows, _tile_rows(call.group_size, call.rows)), threads=1)
            beside = max(beside, ReferenceKernel().scratch_bytes(share))
        return at_once * 4 * tiles + max(library + at_once * (4 * result + beside), others)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        return "it runs on CPUs" if device.type != "cpu" else unsupported_dtype(dtype, DTYPES)


class _Call:
    """One call of `attend`, its operands and scratch; rows and keys are the call's."""

    def __init__(self, operands: Operands, state: AttentionState, may_be_large: bool) -> None:
        (group_size, rows, self.head_dim), device = operands.query.shape, operands.query.device
        self.operands, self.state, self.may_be_large = operands, state, may_be_large
        self.row_tile = _tile_rows(group_size, rows)
        self.value_dim = operands.value.shape[1]
        columns = max(self.head_dim, self.value_dim)
        self.query_tile = torch.zeros((group_size, self.row_tile, columns), dtype=torch.float32, device=device)
        self.first_row = 0
        if _is_ready(operands.key, columns) and _is_ready(operands.value, columns):
            self.key_tile, self.value_tile, self.loaded_keys = operands.key, operands.value, range(operands.keys)
        else:
            self.key_tile = torch.zeros((min(operands.keys, _KEY_TILE), columns), dtype=torch.float32, device=device)
            self.value_tile, self.loaded_keys = torch.zeros_like(self.key_tile), range(0)
        self.upper_mask: torch.Tensor | None = None

    def attend_all(self, sizes: Sizes) -> None:
        """Add what the call is to attend to the state, in parts of these sizes."""
        operands, limits = self.operands, Limits(self.row_tile, _KEY_TILE, _ROW_QUANTUM)
        for of_rows, runs in make_runs(make_parts(operands.rows, operands.keys, operands.intervals, sizes), limits):
            self.load_rows(of_rows)
            for run in runs:
                self.attend(run)
                if operands.attended is not None:
                    operands.attended(run.pairs)

    def load_rows(self, rows: range) -> None:
        """Make these rows of the call the ones to attend with; those after them are computed and dropped."""
        self.first_row = rows.start
        query = self.operands.query[:, rows.start : rows.stop]
        self.query_tile[:, : query.shape[1], : self.head_dim].copy_(query)

    def load_keys(self, keys: range) -> None:
        """Make these keys of the call the ones to attend, and as many after them as there is room for."""
        if self.loaded_keys.start <= keys.start and keys.stop <= self.loaded_keys.stop:
            return
        self.loaded_keys = range(keys.start, min(keys.start + _KEY_TILE, self.operands.keys))
        of_keys, count = slice(keys.start, self.loaded_keys.stop), len(self.loaded_keys)
        self.key_tile[:count, : self.head_dim].copy_(self.operands.key[of_keys])
        self.value_tile[:count, : self.value_dim].copy_(self.operands.value[of_keys])

    def attend(self, run: Run) -> None:
        """Add attention of a run to the state of its rows."""
        self.load_keys(run.keys)
        first, padded = run.first, round_up(run.first.rows, _ROW_QUANTUM)
        query = _evenly(self.query_tile, first.row - self.first_row, padded, run.count, run.row_step)
        key, value = (
            _evenly(tile, first.key - self.loaded_keys.start, first.keys, run.count, run.key_step)
            for tile in (self.key_tile.expand(len(query), -1, -1), self.value_tile.expand(len(query), -1, -1))
        )
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            is_causal=first.shape is Shape.LOWER,
            attn_mask=self._upper_mask(padded, first.keys) if first.shape is Shape.UPPER else None,
            scale=self.operands.scores.scale,
        )
        self._merge(run, out[:, :, : first.rows, : self.value_dim], lse[:, :, : first.rows])

    def _merge(self, run: Run, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge out [g, count, rows, Dv], which is overwritten, and lse [g, count, rows]."""
        first = run.first
        if not self.may_be_large or _largest_magnitude(lse) < _LARGEST_LSE:
            state = self.state
            num, den, maximum = (
                _evenly(tensor, first.row, first.rows, run.count, run.row_step)
                for tensor in (state.num, state.den, state.max)
            )
            _fold(num, den, maximum, out, lse)
        elif run.count == 1:
            self._refer(first)
        else:
            for index in range(run.count):
                self._merge(Run(run.part(index)), out[:, index : index + 1], lse[:, index : index + 1])

    def _refer(self, part: Part) -> None:
        """Have a part attended by the reference."""
        rows, keys = range(part.row, part.row + part.rows), range(part.key, part.key + part.keys)
        every = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        masks = {
            Shape.LOWER: Mask.of(part.rows, part.keys, causal=True),
            Shape.UPPER: Mask.of(part.rows, part.keys, left=0),
        }
        intervals = None
        if part.shape in masks:
            intervals = make_intervals(masks[part.shape], range(part.rows), range(part.keys))
        query, key, value = self.operands.query[:, every[0]], self.operands.key[every[1]], self.operands.value[every[1]]
        ReferenceKernel().attend(
            Operands(query, key, value, self.operands.scores, intervals), self.state.rows(rows.start, rows.stop)
        )

    def _upper_mask(self, rows: int, keys: int) -> torch.Tensor:
        """What is added to scores so that row i attends the keys from i on: [1, 1, rows, keys]."""
        if self.upper_mask is None:
            hidden = torch.full((_TRIANGLE, _TRIANGLE), -math.inf, dtype=torch.float32, device=self.key_tile.device)
            self.upper_mask = hidden.tril_(-1)
        return self.upper_mask[None, None, :rows, :keys]


def _evenly(tensor: torch.Tensor, first: int, length: int, count: int, step: int) -> torch.Tensor:
    """Parts of `length` rows of [g, n, ...], `step` apart, the first at `first`: a view [g, count, length, ...]."""
    group_size, _, *columns = tensor.shape
    of_heads, of_rows, *of_columns = tensor.stride()
    shape, strides = (group_size, count, length, *columns), (of_heads, step * of_rows, of_rows, *of_columns)
    return tensor.as_strided(shape, strides, tensor.storage_offset() + first * of_rows)


def _fold(num: torch.Tensor, den: torch.Tensor, maximum: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge num = out, den = 1 and max = lse, all finite, into a state, in place; `out` and `lse` are overwritten."""
    if float(maximum.amax()) == -math.inf:  # rows without keys so far
        num.add_(out)
        den.add_(1.0)
        maximum.copy_(lse)
        return
    new = torch.maximum(maximum, lse)
    kept = maximum.sub_(new).exp_()
    added = lse.sub_(new).exp_()
    num.mul_(kept.unsqueeze(-1)).add_(out.mul_(added.unsqueeze(-1)))
    den.mul_(kept).add_(added)
    maximum.copy_(new)


def _is_ready(tensor: torch.Tensor, columns: int) -> bool:
    """True if the library can take every row [columns] where it lies: float32, side by side, each on a cache line."""
    aligned = tensor.data_ptr() % _CACHE_LINE == 0 and 4 * columns % _CACHE_LINE == 0
    return aligned and tensor.dtype == torch.float32 and tensor.shape[1] == columns and tensor.is_contiguous()


def _is_narrow(intervals: Intervals | None) -> bool:
    """True if a window has too few keys for its smallest block."""
    window = None if intervals is None else narrowest_window(intervals)
    return window is not None and window <= _WINDOW_BLOCKS[0]


def _tile_rows(group_size: int, rows: int) -> int:
    """Rows of each head that one library call takes at most."""
    return min(max(_ROW_TILE_PER_HEAD, _ROW_TILE // group_size // 256 * 256), round_up(rows, _ROW_QUANTUM))


def _largest_product(operands: Operands) -> float:
    """A bound of the magnitude of q . k; Inf or NaN where an operand has such."""
    query, key, value = map(_largest_magnitude, (operands.query, operands.key, operands.value))
    return query * key * operands.key.shape[1] + 0.0 * value


def _largest_magnitude(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is a NaN."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) if low == low else math.nan
