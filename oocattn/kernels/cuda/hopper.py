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
from oocattn.kernels.cuda.items import scratch_sizes
from oocattn.kernels.kernel import HALF_DTYPES, Kernel, Operands, unsupported_dtype
from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.scores import Scores

logger = logging.getLogger("oocattn")

_MOST_HEAD_DIM = 128


class HopperKernel(Kernel):
    """Our own CUDA C++, compiled when it is first needed: the first question about support makes a tiny call."""

    name = "hopper"
    rounds_weights = True
    max_masked_keys = 1 << 18  # documents at D = 64: 495 TFLOP/s, with 64K keys 450 (H200); spans have 16K keys all the same

    def attend(self, operands: Operands, state: AttentionState) -> None:
        """Launch what there is to do.

        Tensors with an address or strides that are no multiples of 16 bytes are copied before it. Raises ValueError also
        for calls that it cannot count in 32 bits.
        """
        operands.check(state)
        _check_limits(operands, state)
        if operands.rows and operands.keys:
            import_module("oocattn.kernels.cuda.launch").attend(operands, state)

    def scratch_bytes(self, call: CallSize) -> int:
        """The counters, bounds and items of a listed call, or the results of a split one; not the copies of odd tensors."""
        return allocated_bytes(*scratch_sizes(call))

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        reason = hopper_reason(device) or _operands_reason(dtype, head_dim, value_dim)
        return reason or self._refusal(device, dtype, head_dim, value_dim)

    @staticmethod
    @cache
    def _refusal(device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        """The reason why it does not compile or load here; "" if it does."""
        key, value = (torch.zeros(1, dim, dtype=getattr(torch, dtype), device=device) for dim in (head_dim, value_dim))
        try:
            state = AttentionState.empty(1, 1, value_dim, device)
            HopperKernel().attend(Operands(key.unsqueeze(0), key, value, Scores(1.0)), state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # cuda.bindings or NVRTC is not there, or too old
            reason = f"it cannot be compiled or loaded here: {str(error).strip().partition(chr(10))[0]}"
            logger.warning("the kernel hopper is not available (%s); a library's kernel is used in its place", reason)
            return reason
        return ""


def _operands_reason(dtype: str, head_dim: int, value_dim: int) -> str:
    """The reason why rows of `dtype`, D = head_dim and Dv = value_dim cannot be read; "" if they can."""
    fits = all(dim % 8 == 0 and dim <= _MOST_HEAD_DIM for dim in (head_dim, value_dim))
    reason = unsupported_dtype(dtype, HALF_DTYPES)
    return reason or ("" if fits else f"D and Dv must be multiples of 8, {_MOST_HEAD_DIM} at most")


def _check_limits(operands: Operands, state: AttentionState) -> None:
    """Raise ValueError for operands that the kernel would misread, and odd states."""
    dtype, dims = operands.query.dtype, (operands.query.shape[-1], operands.value.shape[-1])
    if _operands_reason(str(dtype).removeprefix("torch."), *dims):
        raise ValueError(
            f"{dtype} with D = {dims[0]}, Dv = {dims[1]}: expected {' or '.join(HALF_DTYPES)}, multiples of 8 up to 128"
        )
    if state.num.data_ptr() % 8 or any(stride % 2 for stride in state.num.stride()[:-1]):
        raise ValueError("num of the state must lie at multiples of 8 bytes")
