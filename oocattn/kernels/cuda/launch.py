"""Launches of our own kernel on Hopper GPUs (hopper.cu), cut into items; only where `cuda.bindings` is installed."""

from __future__ import annotations

import ctypes
import heapq
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from cuda.bindings import driver
from torch import Tensor

from oocattn.kernels.cuda.merging import row_strides, state_of
from oocattn.kernels.cuda.program import Program, checked
from oocattn.kernels.intervals import Band
from oocattn.kernels.state import AttentionState
from oocattn.units import ceil_div, round_up

KEYS_OF_STEP = 128  # `KEYS` of hopper.cu
MOST_SPAN = 16_384  # keys of one accumulation: its error is a third of the weights' (NOTES.md)
PROCESSORS = 132  # multiprocessors to choose spans for, on any GPU, so that all give the same bits
MOST_ROWS = (1 << 31) - (1 << 15)  # rows, keys and items of a call: the kernel counts them in 32 bits
ITEMS = 4  # items of a block; then it ends, and small kernels of other streams get in
_ITEM_STEPS = 3  # cost of an item beside its steps, in steps: fill the pipeline, add the state
_CHOICES, _MANY_ITEMS = 8, 20  # numbers of spans to try, and items per multiprocessor that make any do

_PANEL = 64


@dataclass(frozen=True)
class Tuning:
    """The cut of the program for one head dimension."""

    consumers: int
    stages: int
    ring: bool

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.consumers


TUNING = {64: Tuning(consumers=3, stages=2, ring=True), 128: Tuning(consumers=2, stages=2, ring=False)}
"""By the head dimension, rounded up to a multiple of 64."""


class _Call(ctypes.Structure):
    """`Call` of hopper.cu."""

    _fields_ = (
        *[(name, ctypes.c_int) for name in ("heads", "rows", "keys", "span", "lower", "upper")],
        ("scale", ctypes.c_float),
        ("turns", ctypes.c_void_p),
    )


def attend(query: Tensor, key: Tensor, value: Tensor, state: AttentionState, *, scale: float, band: Band) -> None:
    """Add attention of query [g, n, D] over the keys of `band`, key and value [m, D], to `state`, in place, in one launch.

    float16 or bfloat16, D a multiple of 8 up to 128, scale > 0; n and m are not 0.
    """
    group_size, rows, head_dim = query.shape
    keys, device = key.shape[0], query.device
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    program = program_for(head_dim, query.dtype)
    tuning = TUNING[round_up(head_dim, _PANEL)]
    band = Band(*(max(-rows, min(bound, keys)) for bound in band))  # more is the same
    span = choose_span(group_size, rows, keys, band, tuning.rows)
    tiles = group_size * ceil_div(rows, tuning.rows)
    counters, items = 1 + tiles * tuning.consumers, tiles * ceil_div(keys, span)  # fewer where some attend nothing
    if max(rows, keys, counters, items) > MOST_ROWS:
        raise ValueError(f"a call of {group_size} heads x {rows} rows and {keys} keys is too large: divide it")
    turns = torch.zeros(counters, dtype=torch.int32, device=device)
    call = _Call(group_size, rows, keys, span, *band, scale * math.log2(math.e), turns.data_ptr())
    maps = [_tensor_map(query, tuning.rows), *(_tensor_map(tensor.unsqueeze(0), KEYS_OF_STEP) for tensor in (key, value))]
    threads = 128 * (tuning.consumers + 1)
    # A block for each multiprocessor to spare: so the last items are not left to those that have taken few.
    blocks = ceil_div(items, ITEMS) + torch.cuda.get_device_properties(device).multi_processor_count
    program.launch("attend", device, blocks, threads, (*maps, state_of(state), call))


@lru_cache(4096)
def choose_span(group_size: int, rows: int, keys: int, band: Band, tile: int) -> int:
    """Keys of a span, 16K at most; of few items, the span with which they fill the multiprocessors best."""
    fewest, tiles = ceil_div(keys, MOST_SPAN), group_size * ceil_div(rows, tile)
    times: dict[int, int] = {}
    for spans in range(fewest, fewest + _CHOICES):
        span = round_up(ceil_div(keys, spans), KEYS_OF_STEP)
        if tiles * spans > _MANY_ITEMS * PROCESSORS:
            return min(times, key=times.__getitem__, default=span)
        times[span] = _makespan(steps_of_items(group_size, rows, keys, band, tile, span))
    return min(times, key=times.__getitem__)


def steps_of_items(group_size: int, rows: int, keys: int, band: Band, tile: int, span: int) -> list[int]:
    """Steps of the items of a call, in the order in which hopper.cu takes them."""
    attended = [  # by the rows of each tile
        (max(0, row + band.lower), min(keys, min(rows, row + tile) - 1 + band.upper)) for row in range(0, rows, tile)
    ]
    return [
        ceil_div(min(first + span, stop) - max(first, start - start % KEYS_OF_STEP), KEYS_OF_STEP)
        for first in range(0, keys, span)
        for start, stop in reversed(attended)
        if start < min(first + span, keys) and stop > first
        for _ in range(group_size)
    ]


def _makespan(items: list[int]) -> int:
    """Steps until the last item ends if each goes to the first free processor."""
    free = [0] * PROCESSORS
    for steps in items:
        heapq.heapreplace(free, free[0] + steps + _ITEM_STEPS)
    return max(free)


@cache
def program_for(head_dim: int, dtype: torch.dtype) -> Program:
    """Make hopper.cu for 16-bit rows of D = head_dim, a multiple of 8 up to 128."""
    width = round_up(head_dim, _PANEL)
    tuning = TUNING[width]
    shared = 2 * width * (tuning.rows + 2 * tuning.stages * KEYS_OF_STEP) + 2048
    macros = {
        "HEAD_DIM": head_dim,
        "CONSUMERS": tuning.consumers,
        "STAGES": tuning.stages,
        "RING": int(tuning.ring),
        "ITEMS": ITEMS,
        "BFLOAT16": int(dtype == torch.bfloat16),
        "SHARED_BYTES": shared,
    }
    return Program("hopper.cu", macros, variant="a", shared_bytes=shared)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy the tensor if TMA cannot read it: addresses and strides of 16 bytes."""
    odd = tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1])
    return tensor.clone(memory_format=torch.contiguous_format) if odd else tensor


def _tensor_map(tensor: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
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
    tensor_map = checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            len(shape),
            address,
            [driver.cuuint64_t(size) for size in shape],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in (_PANEL, rows, 1)],
            [driver.cuuint32_t(1) for _ in shape],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.create_string_buffer(ctypes.string_at(tensor_map.getPtr(), 128), 128)
