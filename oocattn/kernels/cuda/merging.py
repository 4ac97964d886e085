"""Merging on a GPU as single launches, without temporaries; the mathematics is defined in `kernels.merging`.

Imported for CUDA tensors only, where `cuda.bindings` is installed. Everything is launched on torch's current stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from oocattn.kernels.cuda.pieces import cut, most_pieces, no_pieces
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.state import AttentionState
from oocattn.problem.bounds import Bounds
from oocattn.units import ceil_div

_WARPS = 8  # rows of a block
_GATHERERS = 4  # warps of a block that merges the spans of a row
_ENTRIES = 256  # rows of a block that enters keys in a ledger
_MOST_SINKS = 512  # of a launch


class State(ctypes.Structure):
    """`State` of state.cuh."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("num", "den", "max", "keys", "key_sum")],
        *[(name, ctypes.c_longlong) for name in ("num_head", "num_row", "den_head", "den_row", "max_head", "max_row")],
        *[(name, ctypes.c_longlong) for name in ("keys_row", "key_sum_row")],
    )


class _Output(ctypes.Structure):
    """`Output` of merge.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("out", "lse")],
        *[(name, ctypes.c_longlong) for name in ("out_head", "out_row", "lse_head", "lse_row")],
    )


class _Sinks(ctypes.Structure):
    """`Sinks` of merge.cu."""

    _fields_ = (("given", ctypes.c_int), ("of_head", ctypes.c_float * _MOST_SINKS))


def merge(into: AttentionState, other: AttentionState) -> None:
    """See `kernels.merging`, as for the functions below."""
    _launch("merge", into, state_of(other))


def gather(into: AttentionState, spans: State, count: int) -> None:
    """Add the results of `count` spans of keys to `into` [g, n, Dv], where `spans` [count, g n, Dv] has spans as heads."""
    heads, rows, value_dim = into.num.shape
    arguments = (state_of(into), spans, ctypes.c_longlong(rows), ctypes.c_int(count))
    _program(value_dim).launch("gather", into.num.device, heads * rows, 32 * _GATHERERS, arguments, early=True)


def fold(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    _launch(f"fold_{_name(out)}", state, _output(out, lse))


def finalise(state: AttentionState, out: torch.Tensor, lse: torch.Tensor, sinks: Sequence[float] | None) -> None:
    if sinks is None:
        _launch(f"finalise_{_name(out)}", state, _output(out, lse), _Sinks())
        return
    for first in range(0, len(sinks), _MOST_SINKS):
        part = slice(first, first + _MOST_SINKS)
        given = _Sinks(1, (ctypes.c_float * _MOST_SINKS)(*sinks[part]))
        _launch(f"finalise_{_name(out)}", state.heads(part.start, part.stop), _output(out[part], lse[part]), given)


def enter(state: AttentionState, bounds: Bounds | None, keys: int, key_sum: int) -> None:
    program, device = _program(state.num.shape[-1]), state.num.device
    every = range(len(state.keys))
    for rows, pieces in [(every, no_pieces(np.int64))] if bounds is None else cut(bounds.table, np.int64):
        numbers = ctypes.c_ulonglong(keys % (1 << 64)), ctypes.c_ulonglong(key_sum % (1 << 64))
        arguments = (state_of(state), *numbers, pieces, ctypes.c_longlong(len(rows)))
        if rows:
            program.launch("enter", device, ceil_div(len(rows), _ENTRIES), _ENTRIES, arguments)


def state_of(state: AttentionState) -> State:
    """The argument that stands for a state on a GPU."""
    pointers = (tensor.data_ptr() for tensor in (state.num, state.den, state.max, state.keys, state.key_sum))
    others = (tensor.stride() for tensor in (state.den, state.max, state.keys, state.key_sum))
    return State(*pointers, *row_strides(state.num), *chain.from_iterable(others))


def row_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of heads and rows of a [g, n, D] whose rows are contiguous."""
    head, row, element = tensor.stride()
    if tensor.shape[-1] > 1 and element != 1:
        raise ValueError(f"strides {tensor.stride()} of [g, n, D]: the innermost dimension must be contiguous")
    return head, row


def _launch(kernel: str, state: AttentionState, *others: Any) -> None:
    """Launch a kernel that takes a row of one head of `state` with each warp."""
    heads, rows, value_dim = state.num.shape
    blocks = -(-heads * rows // _WARPS)
    if blocks:
        first, *last = others
        arguments = (state_of(state), first, ctypes.c_int(heads), ctypes.c_longlong(rows), *last)
        _program(value_dim).launch(kernel, state.num.device, blocks, 32 * _WARPS, arguments)


@cache
def _program(value_dim: int) -> Program:
    sizes = {"VALUE_DIM": value_dim, "MOST_PIECES": most_pieces(np.int64), "MOST_SINKS": _MOST_SINKS}
    return Program("merge.cu", sizes)


def _output(out: torch.Tensor, lse: torch.Tensor) -> _Output:
    return _Output(out.data_ptr(), lse.data_ptr(), *row_strides(out), *lse.stride())


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
