"""Operands as scaled float16 parts of their numbers (split.cu), for the matrix units."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch

from oocattn.kernels.cuda.items import PART_NUMBERS
from oocattn.kernels.cuda.merging import row_strides
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.tuning import MOST_COLUMNS, PANEL, Numbers
from oocattn.kernels.kernel import Operands
from oocattn.units import ceil_div, round_up

_THREADS, _MOST_BLOCKS = 256, 264  # of a launch, and of a tensor
_VECTOR = 8  # numbers that a thread takes at a time, and columns of a projection
_MOST_PROJECTED = MOST_COLUMNS[1]
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_Projection = ctypes.c_float * (_MOST_PROJECTED * _VECTOR)


class _Rows(ctypes.Structure):
    """`Rows` of split.cu."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("from_", "to")],
        *[(name, ctypes.c_longlong) for name in ("head", "row")],
        *[(name, ctypes.c_int) for name in ("heads", "count", "dim", "kind", "parts", "depth", "low", "high")],
    )


class _Tensors(ctypes.Structure):
    """`Tensors` of split.cu."""

    _fields_ = (("of", _Rows * 3), ("largest", ctypes.c_void_p), ("unscaled", ctypes.c_void_p))


def in_parts(operands: Operands, numbers: Numbers) -> tuple[Operands, torch.Tensor]:
    """Operands of which all, or the values, are float16 [.., D] of one part or [.., 2 D] of two; and factors.

    D are padded to whole panels, values projected before. The factors undo the scales of products of queries and keys,
    and of values. Launches on torch's current stream, and waits for nothing.
    """
    given = operands.query, operands.key.unsqueeze(0), operands.value.unsqueeze(0)
    device, projection = operands.query.device, operands.projection
    keys = range(operands.keys) if operands.intervals is None else operands.intervals.reach
    factors = torch.zeros(PART_NUMBERS, dtype=torch.float32, device=device)
    rows, parts = [], list[torch.Tensor]()
    for which, tensor in enumerate(given):
        depth, width = 0, tensor.shape[2]
        if which == 2 and projection is not None:
            depth, width = projection.shape
        heads, count = tensor.shape[:2]
        if which < 2 and numbers.split == "values":
            count = 0
        shape = heads, count, numbers.parts * round_up(width, PANEL)
        parts.append(torch.empty(shape, dtype=torch.float16, device=device))
        attended = range(count) if which == 0 else keys
        sizes = heads, count, width, _KINDS[tensor.dtype], numbers.parts, depth, attended.start, attended.stop
        rows.append(_Rows(tensor.data_ptr(), parts[-1].data_ptr(), *row_strides(tensor), *sizes))
    tensors = _Tensors((_Rows * 3)(*rows), factors.data_ptr(), factors.data_ptr() + 12)
    blocks = min(ceil_div(max(part.numel() for part in parts), numbers.parts * _VECTOR * _THREADS), _MOST_BLOCKS)
    arguments = tensors, _argument(projection)
    for kernel in ("find", "split"):
        _program().launch(kernel, device, 3 * blocks, _THREADS, arguments)
    query, key, value = parts
    if numbers.split == "all":
        return replace(operands, query=query, key=key[0], value=value[0], projection=None), factors[3:]
    bits = value[0].view(operands.value.dtype)  # operands have one dtype
    return replace(operands, value=bits, projection=None), factors[3:]


def _argument(projection: torch.Tensor | None) -> ctypes.Array[ctypes.c_float]:
    """The argument `Projection`, of a tensor on the CPU."""
    argument = _Projection()
    if projection is not None:
        argument[: projection.numel()] = projection.flatten().tolist()
    return argument


@cache
def _program() -> Program:
    return Program("split.cu", {"MOST_COLUMNS": _MOST_PROJECTED})
