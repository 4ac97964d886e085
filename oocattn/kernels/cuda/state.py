"""A state as our CUDA C++ takes it: `State` of state.cuh."""

from __future__ import annotations

import ctypes

import torch

from oocattn.kernels.state import AttentionState


class State(ctypes.Structure):
    """`State` of state.cuh."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("num", "den", "max", "keys", "key_sum")],
        *[(name, ctypes.c_longlong) for name in ("num_head", "num_row", "den_head", "den_row", "max_head", "max_row")],
        *[(name, ctypes.c_longlong) for name in ("keys_row", "key_sum_row")],
    )


def state_of(state: AttentionState) -> State:
    """The argument that stands for a state on a GPU."""
    pointers = (tensor.data_ptr() for tensor in (state.num, state.den, state.max, state.keys, state.key_sum))
    strides = (
        *row_strides(state.num),
        *state.den.stride(),
        *state.max.stride(),
        *state.keys.stride(),
        *state.key_sum.stride(),
    )
    return State(*pointers, *strides)


def row_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of heads and rows of a [g, n, D] whose rows are contiguous."""
    head, row, element = tensor.stride()
    if tensor.shape[-1] > 1 and element != 1:
        raise ValueError(f"strides {tensor.stride()} of [g, n, D]: the innermost dimension must be contiguous")
    return head, row
