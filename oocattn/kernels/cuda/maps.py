"""The maps by which TMA reads tensors [h, n, D] of 16-bit numbers."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from cuda.bindings import driver

from oocattn.kernels.cuda.merging import row_strides
from oocattn.kernels.cuda.program import checked
from oocattn.kernels.cuda.tuning import PANEL


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy the tensor if TMA cannot read it: addresses and strides of 16 bytes."""
    odd = tensor.data_ptr() % 16 or any(stride * tensor.itemsize % 16 for stride in tensor.stride()[:-1])
    return tensor.clone(memory_format=torch.contiguous_format) if odd else tensor


def tensor_map(tensor: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    """The map by which TMA reads boxes of `rows` rows and 64 columns of [h, n, D]."""
    heads, count, head_dim = tensor.shape
    head_stride, row_stride = row_strides(tensor)
    return _encode(
        tensor.data_ptr(),
        tensor.dtype == torch.bfloat16,
        (head_dim, count, heads),
        (2 * row_stride, 2 * (head_stride if heads > 1 else count * row_stride)),
        rows,
    )


@lru_cache(1024)
def _encode(
    address: int, bfloat16: bool, shape: tuple[int, ...], strides: tuple[int, ...], rows: int
) -> ctypes.Array[ctypes.c_char]:
    kinds = driver.CUtensorMapDataType
    encoded = checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            len(shape),
            address,
            [driver.cuuint64_t(size) for size in shape],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in (PANEL, rows, 1)],
            [driver.cuuint32_t(1) for _ in shape],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.create_string_buffer(ctypes.string_at(encoded.getPtr(), 128), 128)
