"""The project's own kernel for Hopper GPUs: it continues the float32 state; how it works is in cuda/hopper.cu.

It rounds and divides nothing in between, and begins a new accumulation every 16K keys at most: it is exact over any number
of keys.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

import torch

from oocattn.kernels.cuda.device import allocated_bytes, hopper_reason
from oocattn.kernels.kernel import HALF_DTYPES, Kernel, Operands, unsupported_dtype
from oocattn.kernels.plain import PlainKernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.scores import Scores

logger = logging.getLogger("oocattn")

_MOST_HEAD_DIM = 128


class HopperKernel(Kernel):
    """Our own CUDA C++, compiled when it is first needed: the first question about support makes a tiny call."""

    name = "hopper"
    rounds_weights = True

    def attend(self, operands: Operands, state: AttentionState) -> None:
        """Launch once, where each row attends one interval and both ends rise by one key a row; else the plain kernel does.

        Tensors with an address or strides that are no multiples of 16 bytes are copied before it. Raises ValueError also
        for calls that it cannot count in 32 bits.
        """
        operands.check(state)
        _check_limits(operands.query, state)
        band = operands.band
        if not operands.rows or not operands.keys:
            return
        if band is None:
            PlainKernel().attend(operands, state)
        elif band.lower < band.upper:
            launch = import_module("oocattn.kernels.cuda.launch")
            tensors = operands.query, operands.key, operands.value
            launch.attend(*tensors, state, scale=operands.scores.scale, band=band)

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """The counters, but not the copies that `attend` may make."""
        return allocated_bytes(4 * (1 + group_size * (rows // 64 + 3)))

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int) -> str:
        return hopper_reason(device) or _operands_reason(dtype, head_dim) or self._refusal(device, dtype, head_dim)

    @staticmethod
    @cache
    def _refusal(device: torch.device, dtype: str, head_dim: int) -> str:
        """The reason why it does not compile or load here; "" if it does."""
        rows = torch.zeros(1, head_dim, dtype=getattr(torch, dtype), device=device)
        try:
            state = AttentionState.empty(1, 1, head_dim, device)
            HopperKernel().attend(Operands(rows.unsqueeze(0), rows, rows, Scores(1.0)), state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # cuda.bindings or NVRTC is not there, or too old
            reason = f"it cannot be compiled or loaded here: {str(error).strip().partition(chr(10))[0]}"
            logger.warning("the kernel hopper is not available (%s); a library's kernel is used in its place", reason)
            return reason
        return ""


def _operands_reason(dtype: str, head_dim: int) -> str:
    """The reason why rows of `dtype` and D = head_dim cannot be read; "" if they can."""
    fits = head_dim % 8 == 0 and head_dim <= _MOST_HEAD_DIM
    return unsupported_dtype(dtype, HALF_DTYPES) or ("" if fits else f"D must be a multiple of 8, {_MOST_HEAD_DIM} at most")


def _check_limits(query: torch.Tensor, state: AttentionState) -> None:
    """Raise ValueError for operands that the kernel would misread, and odd states."""
    head_dim = query.shape[-1]
    if _operands_reason(str(query.dtype).removeprefix("torch."), head_dim):
        raise ValueError(
            f"{query.dtype} with D = {head_dim}: expected {' or '.join(HALF_DTYPES)}, D a multiple of 8 up to 128"
        )
    if state.num.data_ptr() % 8 or any(stride % 2 for stride in state.num.stride()[:-1]):
        raise ValueError("num of the state must lie at multiples of 8 bytes")
