"""Operands as scaled float16 parts of their numbers (split.cu), for the matrix units."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch

from oocattn.kernels.cuda.items import PART_NUMBERS
from oocattn.kernels.cuda.merging import row_strides
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.tuning import PANEL
from oocattn.kernels.kernel import Operands
from oocattn.units import ceil_div, round_up

_THREADS, _MOST_BLOCKS, _VECTOR = 256, 1024, 8  # of a launch, and numbers of a thread


class _Rows(ctypes.Structure):
    """`Rows` of split.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("from_", "to")],
        *[(name, ctypes.c_longlong) for name in ("head", "row")],
        *[(name, ctypes.c_int) for name in ("heads", "count", "dim")],
    )


class _Tensors(ctypes.Structure):
    """`Tensors` of split.cu."""

    _fields_ = (("of", _Rows * 3), ("largest", ctypes.c_void_p), ("unscaled", ctypes.c_void_p))


def in_parts(operands: Operands) -> tuple[Operands, torch.Tensor]:
    """Operands of float16 [.., D] of bfloat16 ones, [.., 2 D] of float32, and the factors that undo their scales.

    D are padded to whole panels. Launches on torch's current stream, and waits for nothing.
    """
    given = operands.query, operands.key.unsqueeze(0), operands.value.unsqueeze(0)
    device, dtype = operands.query.device, operands.query.dtype
    count = 2 if dtype == torch.float32 else 1
    numbers = torch.zeros(PART_NUMBERS, dtype=torch.float32, device=device)
    parts = [
        torch.empty((*tensor.shape[:2], count * round_up(tensor.shape[2], PANEL)), dtype=torch.float16, device=device)
        for tensor in given
    ]
    rows = [
        _Rows(tensor.data_ptr(), part.data_ptr(), *row_strides(tensor), *tensor.shape)
        for tensor, part in zip(given, parts, strict=True)
    ]
    tensors = _Tensors((_Rows * 3)(*rows), numbers.data_ptr(), numbers.data_ptr() + 12)
    blocks = min(ceil_div(max(part.numel() for part in parts), count * _VECTOR * _THREADS), _MOST_BLOCKS)
    for kernel in ("find", "split"):
        _program(dtype).launch(kernel, device, 3 * blocks, _THREADS, (tensors,))
    query, key, value = parts
    return replace(operands, query=query, key=key[0], value=value[0]), numbers[3:]


@cache
def _program(dtype: torch.dtype) -> Program:
    return Program("split.cu", {"BFLOAT16": int(dtype == torch.bfloat16)})
