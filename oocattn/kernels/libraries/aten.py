"""Kernels of attention calls that torch brings: cuDNN, torch's fastest, and FlashAttention 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oocattn.kernels.cuda.device import capability_reason
from oocattn.kernels.kernel import HALF_DTYPES, unsupported_dtype
from oocattn.kernels.libraries.library import LibraryKernel, equal_dims_reason, shared_by_heads
from oocattn.problem.calls import CallSize
from oocattn.units import ceil_div

_WIDE = 91900  # from cuDNN 9.19 on, D up to 256 is right on Hopper: 3e-4 measured at D = 160 and 256 (H200, float16)

# Where a call has too few blocks of rows for the GPU, the library splits the keys and keeps a float32 result of each
# split: num_splits_heuristic in flash_api.cpp. For `blocks` below 0.8 x 2 x multiprocessors, blocks x splits stays below
# 5 x 2 x multiprocessors (computed for all cases).
_BLOCK_ROWS = 64
_MULTIPROCESSORS = 192  # as many as the largest GPUs have, or more


class CudnnKernel(LibraryKernel):
    """Flash attention by cuDNN, through torch; causal calls are square."""

    name = "cudnn"
    plans_shapes = True

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        reason = capability_reason(device, (8, 0)) or unsupported_dtype(dtype, HALF_DTYPES)
        reason = reason or equal_dims_reason(head_dim, value_dim)
        if reason:
            return reason
        version = torch.backends.cudnn.version()
        if version is None:
            return "torch finds no cuDNN"
        wide = torch.cuda.get_device_capability(device) == (9, 0) and version >= _WIDE
        most = 256 if wide else 128
        return "" if head_dim % 8 == 0 and head_dim <= most else f"D must be a multiple of 8, {most} at most"

    def _call(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        copies = 2 if len(key) == 1 else 1  # cuDNN refuses a single key (PyTorch, sdp_utils.cpp): two weigh double
        key, value = (tensor.repeat(copies, 1) if copies > 1 else tensor for tensor in (key, value))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query.unsqueeze(0),
            shared_by_heads(key, len(query)),
            shared_by_heads(value, len(query)),
            None,
            True,
            0.0,
            causal and copies == 1,
            False,
            scale=scale,
        )
        return out[0], lse[0, ..., 0] - math.log(copies) if copies > 1 else lse[0, ..., 0]


class FlashKernel(LibraryKernel):
    """FlashAttention-2 through torch; causal calls are square."""

    name = "flash"

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        reason = capability_reason(device, (8, 0)) or unsupported_dtype(dtype, HALF_DTYPES)
        reason = reason or equal_dims_reason(head_dim, value_dim)
        if not reason and (head_dim % 8 or head_dim > 256):
            return "D must be a multiple of 8, 256 at most"
        return reason

    def _call(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query.unsqueeze(0),
            shared_by_heads(key, len(query)),
            shared_by_heads(value, len(query)),
            0.0,
            causal,
            False,
            scale=scale,
        )
        return out[0], lse[0]

    def _buffers(self, call: CallSize) -> tuple[int, ...]:
        heads_rows, head_dim = call.group_size * call.rows, call.head_dim
        blocks = call.group_size * ceil_div(call.rows, _BLOCK_ROWS)
        if blocks >= 0.8 * 2 * _MULTIPROCESSORS:
            return ()
        key_block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
        splits = min(128, ceil_div(call.keys, key_block), 5 * 2 * _MULTIPROCESSORS // max(1, blocks))
        padded = ceil_div(head_dim, 32) * 32 if head_dim <= 192 else 256
        return (splits * heads_rows * padded * 4, splits * heads_rows * 4)
