"""The project's own kernel for Hopper GPUs: it continues the float32 state; how it works is in cuda/hopper.cu.

It rounds and divides nothing in between, and begins a new accumulation every 16K keys at most: it is exact over any number
of keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module

import torch

from oocattn.kernels.cuda.device import allocated_bytes, hopper_reason, segment_bytes, small_bytes
from oocattn.kernels.cuda.items import scratch_sizes
from oocattn.kernels.cuda.tuning import FOLDED_KEYS, MOST_COLUMNS, Numbers, numbers_for, tuning_for
from oocattn.kernels.kernel import HALF_DTYPES, Kernel, Operands, unsupported_dtype
from oocattn.kernels.second_pass import of_second_pass
from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import VECTORS, SecondPass

logger = logging.getLogger("oocattn")

_DTYPES = (*HALF_DTYPES, "float32")


class HopperKernel(Kernel):
    """Our own CUDA C++, compiled when it is first needed: the first question about support makes a tiny call.

    Numbers and weights of float32 operands are two float16 parts each: as exact as float32 products that are not truncated.
    """

    name = "hopper"
    rounds_weights = True

    def numbers(self, dtype: str) -> Numbers:
        """How rows of a dtype are multiplied."""
        return numbers_for(dtype, precise=not self.rounds_weights, shifted=self.shifted)

    def attend(self, operands: Operands, state: AttentionState) -> None:
        """Launch what there is to do.

        Tensors with an address or strides that are no multiples of 16 bytes are copied before it. Raises ValueError also
        for calls that it cannot count in 32 bits.
        """
        operands.check(state)
        self._check_limits(operands, state)
        if operands.rows and operands.keys:
            import_module("oocattn.kernels.cuda.launch").attend(operands, state, precise=not self.rounds_weights)

    def scratch_bytes(self, call: CallSize) -> int:
        """Parts of float32 numbers, counters, bounds and items, results of a split call; not the copies of odd tensors.

        Calls by themselves take segments of several sizes, those of a lane one for all that is large.
        """
        sizes = self.scratch_sizes(call)
        return max(allocated_bytes(*sizes), segment_bytes(*sizes) + small_bytes(*sizes))

    def segment_bytes(self, call: CallSize) -> int:
        return segment_bytes(*self.scratch_sizes(call))

    def scratch_sizes(self, call: CallSize) -> tuple[int, ...]:
        """Bytes of the tensors that a call, or a smaller one, allocates at most."""
        if self.shifted:
            call = replace(call, value_dim=VECTORS)
        numbers, long = self.numbers(call.dtype), call.keys > FOLDED_KEYS
        tuning = tuning_for(call.head_dim, call.value_dim, numbers, long=long, plain=call.plain)
        return scratch_sizes(call, tuning)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        reason = hopper_reason(device) or self._operands_reason(dtype, head_dim, value_dim)
        return reason or self._refusal(device, dtype, head_dim, value_dim)

    def _operands_reason(self, dtype: str, head_dim: int, value_dim: int) -> str:
        """The reason why rows of `dtype`, D = head_dim and Dv = value_dim cannot be read; "" if they can."""
        most = MOST_COLUMNS[max(self.numbers(dtype)[:2])]
        fits = all(dim % 8 == 0 and dim <= most for dim in (head_dim, value_dim))
        reason = unsupported_dtype(dtype, _DTYPES)
        return reason or ("" if fits else f"D and Dv of {dtype} must be multiples of 8, {most} at most")

    def _check_limits(self, operands: Operands, state: AttentionState) -> None:
        """Raise ValueError for operands that the kernel would misread, and odd states."""
        dtype = str(operands.query.dtype).removeprefix("torch.")
        reason = self._operands_reason(dtype, operands.query.shape[-1], operands.value.shape[-1])
        if reason:
            raise ValueError(reason)
        if state.num.data_ptr() % 8 or any(stride % 2 for stride in state.num.stride()[:-1]):
            raise ValueError("num of the state must lie at multiples of 8 bytes")

    @classmethod
    @cache
    def _refusal(cls, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        """The reason why it does not compile or load here; "" if it does."""

        def attend() -> None:
            key, value = (torch.zeros(1, dim, dtype=getattr(torch, dtype), device=device) for dim in (head_dim, value_dim))
            operands = Operands(key.unsqueeze(0), key, value, Scores(1.0))
            if cls.shifted:
                operands = of_second_pass(operands, SecondPass(0), torch.zeros(1, 1, device=device))
            state = AttentionState.empty(1, 1, VECTORS if cls.shifted else value_dim, device)
            cls().attend(operands, state)

        return refusal_of(cls.name, attend)


def refusal_of(name: str, attend: Callable[[], object]) -> str:
    """The reason why a kernel's call fails here, as where it cannot be compiled; "" if it does not."""
    try:
        attend()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # cuda.bindings or NVRTC is not there, or too old
        reason = f"it cannot be compiled or loaded here: {str(error).strip().partition(chr(10))[0]}"
        logger.warning("the kernel %s is not available (%s); another is used in its place", name, reason)
        return reason
    return ""


class HopperWeightsKernel(HopperKernel):
    """Second passes that prove a result: weights of known shifts, in two float16 parts where inputs are float32."""

    name = "hopper-weights"
    shifted = True


class HopperPreciseKernel(HopperKernel):
    """The same with weights in two parts, and sums of the matrix units added up in float32 every 256 keys."""

    name = "hopper-precise"
    rounds_weights = False
