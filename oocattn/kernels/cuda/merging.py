"""Merging on a GPU as single launches, without temporaries; the mathematics is defined in `kernels.merging`.

Imported for CUDA tensors only, where `cuda.bindings` is installed. Everything is launched on torch's current stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch

from oocattn.kernels.cuda.program import Program
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Ramp
from oocattn.units import ceil_div

_WARPS = 8  # rows of a block
_ENTRIES = 256  # rows of a block that enters keys in a ledger


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


class _Entry(ctypes.Structure):
    """`Entry` of merge.cu."""

    _fields_ = (
        ("first_row", ctypes.c_longlong),
        ("keys", ctypes.c_longlong),
        ("key_sum", ctypes.c_ulonglong),
        ("ranges", ctypes.c_longlong),
        ("ramps", ctypes.c_longlong * 12),
    )


def merge(into: AttentionState, other: AttentionState) -> None:
    """See `kernels.merging`, as for the functions below."""
    _launch("merge", into, state_of(other))


def fold(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    _launch(f"fold_{_name(out)}", state, _output(out, lse))


def finalise(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    _launch(f"finalise_{_name(out)}", state, _output(out, lse))


def enter(state: AttentionState, first_row: int, ramps: Sequence[Ramp], keys: int, key_sum: int) -> None:
    rows = len(state.keys)
    bounds = [number for ramp in ramps for number in (ramp.offset, ramp.least, ramp.most)]
    entry = _Entry(first_row, keys, key_sum % (1 << 64), len(ramps) // 2, (ctypes.c_longlong * 12)(*bounds))
    if rows:
        arguments = (state_of(state), entry, ctypes.c_longlong(rows))
        _program(state.num.shape[-1]).launch("enter", state.num.device, ceil_div(rows, _ENTRIES), _ENTRIES, arguments)


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


def _launch(kernel: str, state: AttentionState, other: ctypes.Structure) -> None:
    """Launch a kernel that takes a row of one head of `state` with each warp."""
    heads, rows, head_dim = state.num.shape
    blocks = -(-heads * rows // _WARPS)
    if blocks:
        arguments = (state_of(state), other, ctypes.c_int(heads), ctypes.c_longlong(rows))
        _program(head_dim).launch(kernel, state.num.device, blocks, 32 * _WARPS, arguments)


@cache
def _program(head_dim: int) -> Program:
    return Program("merge.cu", {"HEAD_DIM": head_dim})


def _output(out: torch.Tensor, lse: torch.Tensor) -> _Output:
    return _Output(out.data_ptr(), lse.data_ptr(), *row_strides(out), *lse.stride())


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
