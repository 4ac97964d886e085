"""The CPU kernel: torch's flash attention on float32 tiles, merged in float32.

The library call is `aten::_scaled_dot_product_flash_attention_for_cpu`, in PyTorch's
aten/src/ATen/native/cpu/FlashAttentionKernel.cpp. What it gets wrong is kept away from it:

* No query or no key kills the process, an innermost stride other than 1 gives wrong numbers, and 16-bit inputs cost
  accuracy: every tile is first copied, as float32 and contiguous, into scratch.
* Its bits depend on the number of threads, for the matrix products of a single block of rows are divided among them, and on
  operands off a cache line: a call has never fewer than `_ROW_QUANTUM` rows, and every tile starts on a cache line.
* The log-sum-exp of a row whose scores are all large, as of padding masked by -1e9, has lost how many keys it stands for:
  where one exceeds `_LARGEST_LSE`, the call is made again by the reference.
* A row whose scores are all -inf comes back as (out 0, lse 0), and a NaN or Inf in a masked value reaches the rows that
  mask it: calls that may meet them, or whose rows attend other keys than all, or up to a diagonal, go to the reference.
* A causal call on one head divides its rows, not its work, among the threads, and computes masked keys too: the triangle
  is halved recursively into plain rectangles and triangles small enough to be level.
"""

from __future__ import annotations

import math

import torch

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Kernel, Operands, unsupported_dtype
from oocattn.kernels.merging import SCRATCH_BYTES, fold
from oocattn.kernels.plain import PRODUCT_BYTES, ReferenceKernel
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.kernels.tiles import make_tiles
from oocattn.problem.mask import Causal
from oocattn.problem.problem import DTYPES
from oocattn.units import round_up

# Tiles. The rates are of 2 cores (Zen 4, torch 2.13) on float32, D = 64, where no tile above 1,024 x 1,024 differs by
# more than 5%: 158 to 169 GFLOP/s (D = 32: 134 to 140; D = 128: 171 to 185).
_KEY_TILE = 8192  # keys of one library call: 4 MiB of K and V at D = 64, and merging costs 0.2% of the call
_ROW_TILE = 4096  # rows of one library call over all heads: blocks enough for 16 threads
_ROW_TILE_PER_HEAD = 1024  # and at least: below 768 rows the library takes blocks of 64 rows, 6% slower
_ROW_BLOCKS = 512  # a tile larger than this is cut to a multiple: two threads' blocks of 256, so that none waits
_ROW_QUANTUM = 64  # rows are padded to two blocks of 32, the library's smallest, or more
_TRIANGLE = 512  # rows of the triangles that are left: 8 equal blocks of 64 rows, each of 512 keys, masked or not
_LARGEST_LSE = 1024.0  # beyond it, float32 keeps less than 14 bits of what a log-sum-exp says of the number of keys
_LIBRARY_BLOCK = (256, 512)  # rows and keys of the score block that each thread of the library call allocates


class CpuKernel(Kernel):
    """Flash attention on the CPU. Its bits do not depend on the number of threads that torch gives the calling one."""

    name = "cpu"

    @full_precision(torch.device("cpu"))
    def attend(self, operands: Operands, state: AttentionState) -> None:
        operands.check(state)
        rows, keys, band = operands.rows, operands.keys, operands.band
        if rows == 0 or keys == 0:
            return
        if band is None or not band.is_open_below(rows) or not _all_finite(operands):
            ReferenceKernel().attend(operands, state)
            return
        call = _Call(operands, state)
        for row, end, first, last, triangular in make_tiles(rows, keys, rows, _KEY_TILE, upper=band.upper):
            call.load(first, last)
            if triangular:
                call.triangle(row, end, first)
            else:
                call.rectangle(row, end, first, last)

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        tile_rows = group_size * _tile_rows(group_size, rows)
        tiles = tile_rows * head_dim + 2 * min(keys, _KEY_TILE) * head_dim
        result = tile_rows * (head_dim + 1)
        block_rows, block_keys = _LIBRARY_BLOCK
        library = threads * (4 * block_rows * (block_keys + head_dim + 2) + PRODUCT_BYTES)
        reference = ReferenceKernel().scratch_bytes(group_size, rows, keys, head_dim, dtype, threads)
        return 4 * tiles + max(4 * result + library + SCRATCH_BYTES, reference)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int) -> str:
        return "it runs on CPUs" if device.type != "cpu" else unsupported_dtype(dtype, DTYPES)


class _Call:
    """One call of `attend`, its operands and scratch; rows and keys are the call's."""

    def __init__(self, operands: Operands, state: AttentionState) -> None:
        (group_size, rows, head_dim), device = operands.query.shape, operands.query.device
        self.operands, self.state = operands, state
        self.row_tile = _tile_rows(group_size, rows)
        self.query_tile = torch.zeros((group_size, self.row_tile, head_dim), dtype=torch.float32, device=device)
        self.key_tile = torch.empty((min(operands.keys, _KEY_TILE), head_dim), dtype=torch.float32, device=device)
        self.value_tile = torch.empty_like(self.key_tile)
        self.first_key = self.last_key = 0

    def load(self, first_key: int, last_key: int) -> None:
        """Make keys [first_key, last_key) of the call the ones to attend, if they are not."""
        if (self.first_key, self.last_key) != (first_key, last_key):
            self.key_tile[: last_key - first_key].copy_(self.operands.key[first_key:last_key])
            self.value_tile[: last_key - first_key].copy_(self.operands.value[first_key:last_key])
            self.first_key, self.last_key = first_key, last_key

    def triangle(self, start: int, stop: int, first_key: int) -> None:
        """A triangle from row `start` and `first_key` on: two smaller ones and a square."""
        if stop - start <= _TRIANGLE:
            self._attend(start, stop, first_key, first_key + stop - start, causal=True)
            return
        rows = round_up((stop - start) // 2, _TRIANGLE)
        self.triangle(start, start + rows, first_key)
        self.triangle(start + rows, stop, first_key + rows)
        self.rectangle(start + rows, stop, first_key, first_key + rows)

    def rectangle(self, start: int, stop: int, first_key: int, last_key: int) -> None:
        """Rows [start, stop) attend every key of [first_key, last_key)."""
        while start < stop:
            rows = min(self.row_tile, stop - start)
            if rows > _ROW_BLOCKS:
                rows -= rows % _ROW_BLOCKS
            self._attend(start, start + rows, first_key, last_key, causal=False)
            start += rows

    def _attend(self, start: int, stop: int, first_key: int, last_key: int, *, causal: bool) -> None:
        rows, scores = stop - start, self.operands.scores
        query = self.query_tile[:, : round_up(rows, _ROW_QUANTUM)]  # the rows beyond are computed and dropped
        query[:, :rows].copy_(self.operands.query[:, start:stop])
        keys = slice(first_key - self.first_key, last_key - self.first_key)
        key, value = self.key_tile[keys], self.value_tile[keys]
        shared = (1, len(query), *key.shape)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.unsqueeze(0), key.expand(shared), value.expand(shared), is_causal=causal, scale=scores.scale
        )
        state = self.state.rows(start, stop)
        if float(lse[0, :, :rows].abs().amax()) < _LARGEST_LSE:
            fold(state, out[0, :, :rows], lse[0, :, :rows])
            return
        del out, lse
        intervals = make_intervals(Causal(rows, rows), range(rows), range(rows)) if causal else None
        ReferenceKernel().attend(Operands(query[:, :rows], key, value, scores, intervals), state)


def _tile_rows(group_size: int, rows: int) -> int:
    """Rows of each head that one library call takes at most."""
    return min(max(_ROW_TILE_PER_HEAD, _ROW_TILE // group_size // 256 * 256), round_up(rows, _ROW_QUANTUM))


def _all_finite(operands: Operands) -> bool:
    """True if every value is finite and no score can overflow float32."""
    query, key, value = map(_largest_magnitude, (operands.query, operands.key, operands.value))
    score_bound = query * key * operands.key.shape[1] * max(1.0, operands.scores.scale)
    return score_bound < torch.finfo(torch.float32).max and math.isfinite(value)


def _largest_magnitude(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is a NaN."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high)) if low == low else math.nan
