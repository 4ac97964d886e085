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
from oocattn.problem.bounds import Bounds

logger = logging.getLogger("oocattn")

SCRATCH_BYTES = 1 << 20
"""Temporaries of `merge` and `finalise`, or one row of all heads: 1 MiB stays in the second-level cache of a core."""

_LEDGER_ROWS = 4096  # rows whose ledger is entered at a time: half a megabyte of temporaries
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


def finalise(state: AttentionState, out: torch.Tensor, lse: torch.Tensor, sinks: Sequence[float] | None = None) -> None:
    """Write out = num / den and the natural logarithm lse = max + log(den).

    `out` is [g, n, Dv] float16, bfloat16 or float32, `lse` [g, n] float32. A row with no key gives out = 0, as torch's
    attention has it, and lse = -inf. `sinks` has a learnable sink for each head, which is merged first: num = 0, den = 1,
    max = sink and no keys; `state` keeps what it has. Raises ValueError if the shapes differ.
    """
    if out.shape != state.num.shape or lse.shape != state.den.shape:
        raise ValueError(f"cannot write a state {list(state.num.shape)} to out {list(out.shape)} and lse {list(lse.shape)}")
    if sinks is not None and len(sinks) != len(out):
        raise ValueError(f"{len(sinks)} sinks: expected one of each of {len(out)} heads")
    fused = _fused(state.num)
    if fused is not None:
        fused.finalise(state, out, lse, sinks)
        return
    of_heads = None if sinks is None else torch.tensor(sinks, dtype=torch.float32, device=out.device).unsqueeze(-1)
    for start, stop in _row_blocks(state):
        block = state.rows(start, stop)
        num, den, maximum = (block.num, block.den, block.max) if of_heads is None else _with_sink(block, of_heads)
        divisor = den.masked_fill(den == 0, 1.0)
        out[:, start:stop].copy_(torch.div(num, divisor.unsqueeze(-1), out=None if of_heads is None else num))
        lse[:, start:stop].copy_(maximum + torch.log(den))


def enter(state: AttentionState, bounds: Bounds | None, *, keys: int = 0, key_sum: int = 0) -> None:
    """Enter attended keys in the ledger of `state`, in place.

    Each row attends the keys that `bounds` say, by the problem's own indices, with rows counted from the state's first; and
    `keys` more, whose indices sum to `key_sum` modulo 2^64. Raises ValueError for the bounds of other rows.
    """
    if bounds is not None and (bounds.edges[0], bounds.edges[-1]) != (0, len(state.keys)):
        raise ValueError(f"bounds of rows {bounds.edges[0]} to {bounds.edges[-1]}: expected 0 to {len(state.keys)}")
    fused = _fused(state.keys)
    if fused is not None:
        fused.enter(state, bounds, keys, key_sum)
        return
    state.keys.add_(keys)
    state.key_sum.add_(_signed(key_sum))
    if bounds is None:
        return
    for start in range(0, len(state.keys), _LEDGER_ROWS):
        block = state.rows(start, min(start + _LEDGER_ROWS, len(state.keys)))
        _enter_bounds(block, bounds.part(range(start, start + len(block.keys))))


def _enter_bounds(state: AttentionState, bounds: Bounds) -> None:
    values = torch.from_numpy(bounds.values()).to(state.keys.device)
    for low, high in (values[:, :2].unbind(1), values[:, 2:].unbind(1)):
        count, ends = high - low, high + low - 1  # the sum is half their product, and one of them is even
        odd = count % 2 == 1
        state.keys.add_(count)
        state.key_sum.add_(torch.where(odd, count, count // 2) * torch.where(odd, ends // 2, ends))


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


def _with_sink(state: AttentionState, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The num, den and max of a state with the sinks [g, 1] of its heads; the state stays as it is."""
    maximum = torch.maximum(state.max, sinks)
    shift = finite_shift(maximum)
    kept = torch.exp(state.max - shift)
    return state.num * kept.unsqueeze(-1), state.den * kept + torch.exp(sinks - shift), maximum


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
