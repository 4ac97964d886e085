"""Exact recombination of states, and the division that ends it.

On a GPU each is one launch of our own (`cuda.merging`), elsewhere torch operations on blocks of rows: the states themselves
may fill most of a memory budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Ramp

logger = logging.getLogger("oocattn")

SCRATCH_BYTES = 1 << 20
"""Temporaries of `merge` and `finalise`, or one row of all heads: 1 MiB stays in the second-level cache of a core."""

_LEDGER_ROWS = 8192  # rows whose ledger is entered at a time: half a megabyte of temporaries
_VECTORS = 8  # temporaries of one float32 per head and row that are alive at once, at most


def merge(into: AttentionState, other: AttentionState) -> None:
    """Add the keys of `other` to those of `into`, in place; the rows are the same.

    With m = max(m1, m2): num = num1 exp(m1 - m) + num2 exp(m2 - m), den likewise (Milakov and Gimelshein, arXiv 1805.02867,
    section 3.1); the ledgers are added. exp(lse) is never formed: it overflows. A row with no key contributes nothing; NaN
    and +Inf make their own row NaN. Raises ValueError if the shapes differ.
    """
    if into.num.shape != other.num.shape:
        raise ValueError(f"cannot merge a state {list(other.num.shape)} into one of {list(into.num.shape)}")
    fused = _fused(into.num)
    if fused is not None:
        fused.merge(into, other)
        return
    for start, stop in _row_blocks(into):
        _merge_block(into.rows(start, stop), other.rows(start, stop))


def fold(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Add the results of a library's attention call to `state`, in place: merge num = out, den = 1 and max = lse.

    `out` [g, n, D] of any float dtype, last stride 1, divided already, and the natural log-sum-exp `lse` [g, n] float32.
    Nothing is entered in the ledger. Raises ValueError if the shapes differ.
    """
    if out.shape != state.num.shape or lse.shape != state.den.shape:
        raise ValueError(f"cannot fold out {list(out.shape)} and lse {list(lse.shape)} into a state {list(state.num.shape)}")
    fused = _fused(state.num)
    if fused is not None:
        fused.fold(state, out, lse)
        return
    ones = torch.ones((), dtype=torch.float32, device=lse.device).expand_as(lse)
    merge(state, AttentionState.without_ledger(out, ones, lse))


def finalise(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Write out = num / den and the natural logarithm lse = max + log(den).

    `out` is [g, n, D] float16, bfloat16 or float32, `lse` [g, n] float32. A row with no key gives out = 0, as torch's
    attention has it, and lse = -inf. Raises ValueError if the shapes differ.
    """
    if out.shape != state.num.shape or lse.shape != state.den.shape:
        raise ValueError(f"cannot write a state {list(state.num.shape)} to out {list(out.shape)} and lse {list(lse.shape)}")
    fused = _fused(state.num)
    if fused is not None:
        fused.finalise(state, out, lse)
        return
    for start, stop in _row_blocks(state):
        block = state.rows(start, stop)
        divisor = block.den.masked_fill(block.den == 0, 1.0)
        out[:, start:stop].copy_(block.num / divisor.unsqueeze(-1))
        lse[:, start:stop].copy_(block.max + torch.log(block.den))


def enter(state: AttentionState, first_row: int, ramps: Sequence[Ramp], *, keys: int = 0, key_sum: int = 0) -> None:
    """Enter attended keys in the ledger of `state`, of the rows from `first_row` on, in place.

    Each row attends `keys` keys, whose indices sum to `key_sum` modulo 2^64, and those between each two of `ramps`.
    """
    fused = _fused(state.keys)
    if fused is not None:
        fused.enter(state, first_row, ramps, keys, key_sum)
        return
    state.keys.add_(keys)
    state.key_sum.add_(_signed(key_sum))
    for start in range(0, len(state.keys), _LEDGER_ROWS) if ramps else ():
        block = state.rows(start, start + _LEDGER_ROWS)
        rows = torch.arange(len(block.keys), dtype=torch.int64, device=block.keys.device).add_(first_row + start)
        for lower, upper in zip(ramps[::2], ramps[1::2], strict=True):
            low, high = (torch.clamp(rows + ramp.offset, ramp.least, ramp.most) for ramp in (lower, upper))
            block.keys.add_(high).sub_(low)
            count, ends = high - low, high + low - 1  # the sum is half their product, and one of them is even
            odd = count % 2 == 1
            block.key_sum.add_(torch.where(odd, count, count // 2) * torch.where(odd, ends // 2, ends))


def _signed(number: int) -> int:
    """The signed number of 64 bits that is equal to `number` modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def finite_shift(maximum: torch.Tensor) -> torch.Tensor:
    """The shift before exp: the maximum, or 0 where it is -inf, or NaN would come."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def _fused(tensor: torch.Tensor) -> ModuleType | None:
    """Our own launches, where the tensor is on a GPU and they can be compiled."""
    return _load_fused() if tensor.device.type == "cuda" else None


@cache
def _load_fused() -> ModuleType | None:
    try:
        fused = import_module("oocattn.kernels.cuda.merging")
        state = AttentionState.empty(1, 1, 1, "cuda")
        fused.merge(state, state)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # cuda.bindings or NVRTC is not there, or knows nothing of this GPU
        logger.warning("merging cannot be compiled (%s); slower operations of torch are used", error)
        return None
    return fused


def _row_blocks(state: AttentionState) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose temporaries fit SCRATCH_BYTES."""
    group_size, rows, head_dim = state.num.shape
    step = max(1, SCRATCH_BYTES // (4 * group_size * (head_dim + _VECTORS)))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _merge_block(into: AttentionState, other: AttentionState) -> None:
    maximum = torch.maximum(into.max, other.max)
    shift = finite_shift(maximum)
    kept = torch.exp(into.max - shift)
    added = torch.exp(other.max - shift)
    into.num.mul_(kept.unsqueeze(-1)).add_(other.num * added.unsqueeze(-1))
    into.den.mul_(kept).add_(other.den * added)
    into.max.copy_(maximum)
    into.keys.add_(other.keys)
    into.key_sum.add_(other.key_sum)
