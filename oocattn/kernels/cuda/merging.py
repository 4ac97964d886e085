"""Merging on a GPU as single launches, without temporaries; what they compute is defined in `kernels.merge`.

Imported for CUDA tensors only, and only where `cuda.bindings` is installed. Everything is launched on torch's current
stream of the tensors' device; nothing is allocated and nothing waits.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.state import row_strides, state_of
from oocattn.kernels.state import AttentionState

_WARPS = 8  # rows of a block


class _Output(ctypes.Structure):
    """`Output` of merge.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("out", "lse")],
        *[(name, ctypes.c_longlong) for name in ("out_head", "out_row", "lse_head", "lse_row")],
    )


def merge(into: AttentionState, other: AttentionState) -> None:
    """See `merge.merge`: one launch for all fields."""
    _launch("merge", into, state_of(other))


def fold(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    """See `merge.fold`: one launch for all fields."""
    _launch(f"fold_{_name(out)}", state, _output(out, lse))


def finalise(state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
    """See `merge.finalise`: one launch."""
    _launch(f"finalise_{_name(out)}", state, _output(out, lse))


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
