"""Operands as scaled float16 parts of their numbers (split.cu), for the matrix units."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch

from oocattn.kernels.cuda.items import PART_NUMBERS
from oocattn.kernels.cuda.merging import row_strides
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.tuning import MOST_COLUMNS, PANEL
from oocattn.kernels.kernel import Operands
from oocattn.units import ceil_div, round_up

_THREADS, _MOST_BLOCKS = 256, 1024  # of a launch, and of a tensor
_VECTOR = 8  # numbers that a thread takes at a time, and columns of a projection
_MOST_PROJECTED = MOST_COLUMNS[1]
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Projection = ctypes.c_float * (_MOST_PROJECTED * _VECTOR)


class _Rows(ctypes.Structure):
    """`Rows` of split.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("from_", "to")],
        *[(name, ctypes.c_longlong) for name in ("head", "row")],
        *[(name, ctypes.c_int) for name in ("heads", "count", "dim", "kind", "parts", "depth")],
    )


class _Tensors(ctypes.Structure):
    """`Tensors` of split.cu."""

    _fields_ = (("of", _Rows * 3), ("largest", ctypes.c_void_p), ("unscaled", ctypes.c_void_p))


def in_parts(operands: Operands) -> tuple[Operands, torch.Tensor]:
    """Operands of float16 [.., D] of 16-bit ones, [.., 2 D] of float32, and the factors that undo their scales.

    D are padded to whole panels. Values are projected before. Launches on torch's current stream, and waits for nothing.
    """
    device, dtype = operands.query.device, operands.query.dtype
    count, projection = 2 if dtype == torch.float32 else 1, operands.projection
    given = operands.query, operands.key.unsqueeze(0), operands.value.unsqueeze(0)
    columns = *(tensor.shape[2] for tensor in given[:2]), (operands.value if projection is None else projection).shape[1]
    numbers = torch.zeros(PART_NUMBERS, dtype=torch.float32, device=device)
    parts = [
        torch.empty((*tensor.shape[:2], count * round_up(width, PANEL)), dtype=torch.float16, device=device)
        for tensor, width in zip(given, columns, strict=True)
    ]
    depths = 0, 0, 0 if projection is None else len(projection)
    rows = [
        _Rows(
            tensor.data_ptr(), part.data_ptr(), *row_strides(tensor), *tensor.shape[:2], width, _KINDS[dtype], count, depth
        )
        for tensor, part, width, depth in zip(given, parts, columns, depths, strict=True)
    ]
    tensors = _Tensors((_Rows * 3)(*rows), numbers.data_ptr(), numbers.data_ptr() + 12)
    blocks = min(ceil_div(max(part.numel() for part in parts), count * _VECTOR * _THREADS), _MOST_BLOCKS)
    for kernel in ("find", "split"):
        _program().launch(kernel, device, 3 * blocks, _THREADS, (tensors, _argument(projection)))
    query, key, value = parts
    return replace(operands, query=query, key=key[0], value=value[0], projection=None), numbers[3:]


def _argument(projection: torch.Tensor | None) -> ctypes.Array[ctypes.c_float]:
    """The argument `Projection`, of a tensor on the CPU."""
    argument = _Projection()
    if projection is not None:
        argument[: projection.numel()] = projection.flatten().tolist()
    return argument


@cache
def _program() -> Program:
    return Program("split.cu", {"MOST_COLUMNS": _MOST_PROJECTED})
