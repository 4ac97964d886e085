"""Launches of our own kernels on Hopper GPUs (hopper.cu, survey.cu); only where `cuda.bindings` is installed.

A call is made in one of three ways. Where each row attends one interval and both ends rise by one key a row (a band), items
follow from its two numbers. Other bounds are worked out on the GPU, which lists the items. A full call of few rows has the
heads' rows packed in tiles, and its spans merged afterwards.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import torch

from oocattn.kernels.cuda.far import brought_near, continued_far_away, shifted_far_away
from oocattn.kernels.cuda.items import ITEMS, MOST_LISTED_KEYS, MOST_SPLIT_KEYS, choose_span, is_split, split_span
from oocattn.kernels.cuda.listing import MOST_PIECES, list_items
from oocattn.kernels.cuda.maps import aligned, tensor_map
from oocattn.kernels.cuda.merging import State, gather, state_of
from oocattn.kernels.cuda.parts import in_parts
from oocattn.kernels.cuda.program import Program
from oocattn.kernels.cuda.reducing import Reduced, Reductions
from oocattn.kernels.cuda.tuning import FOLDED_KEYS, Numbers, Tuning, numbers_for, reducing_tuning, tuning_for
from oocattn.kernels.intervals import Band
from oocattn.kernels.kernel import Operands
from oocattn.kernels.state import AttentionState
from oocattn.units import ceil_div

MOST_ROWS = (1 << 31) - (1 << 15)  # rows, keys and items of a call: the kernel counts them in 32 bits
_LISTED_OF_TILE = 2  # items of a tile that blocks are launched for, in a listed call
MOST_SLOPES = 256  # heads of a launch with slopes
_ADDRESSES = ("next", "turns", "listed", "items", "walks", "wholes", "bounds", "positions")
_SWITCHES = ("listed", "split", "softcap", "slopes", "bias", "shifted")
_LOG2E = math.log2(math.e)
_LARGEST = torch.finfo(torch.float32).max
_NO_CAP = 2.0**100  # a softcap from here on changes no score that float32 tells apart


class _Call(ctypes.Structure):
    """`Call` of items.cuh."""

    _fields_ = (
        *[(name, ctypes.c_int) for name in ("heads", "rows", "keys", "span", "lower", "upper")],
        *[(name, ctypes.c_float) for name in ("scale", "cap")],
        *[(name, ctypes.c_void_p) for name in (*_ADDRESSES, "bias", "unscaled", "shift")],
        *[(name, ctypes.c_longlong) for name in ("shift_head", "bias_head")],
        ("slopes", ctypes.c_float * MOST_SLOPES),
    )


class Variant(NamedTuple):
    """What is compiled into a program of hopper.cu, or of survey.cu where weights are reduced."""

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    precise: bool = False
    long: bool = False
    listed: bool = False
    split: bool = False
    softcap: bool = False
    slopes: bool = False
    bias: bool = False
    shifted: bool = False
    reductions: Reductions | None = None

    @property
    def tuning(self) -> Tuning:
        """The cut of the program."""
        plain = not (self.softcap or self.slopes or self.bias)
        if self.reductions is not None:
            return reducing_tuning(self.head_dim, self.numbers, self.reductions, plain=plain)
        return tuning_for(self.head_dim, self.value_dim, self.numbers, long=self.long, plain=plain)

    @property
    def numbers(self) -> Numbers:
        """How its numbers are multiplied."""
        asked = {"precise": self.precise, "shifted": self.shifted, "reduced": self.reductions is not None}
        return numbers_for(str(self.dtype).removeprefix("torch."), **asked)


def attend(operands: Operands, state: AttentionState, *, precise: bool) -> None:
    """Add attention to `state`, in place; see `Kernel.attend`.

    float16, bfloat16 or float32, D and Dv multiples of 8 up to `MOST_COLUMNS`; n and m are not 0. `precise` keeps two parts
    of a weight of 16-bit rows. Operands with a shift have a projection, too, or their weights are reduced.
    """
    given = (operands.query, operands.key, operands.value)
    query, key, value = map(aligned, given)
    if any(tensor is not each for tensor, each in zip((query, key, value), given, strict=True)):
        operands = replace(operands, query=query, key=key, value=value)
    cap = operands.scores.softcap
    terms = (cap is not None and cap < _NO_CAP, operands.slopes is not None, operands.key_bias is not None)
    columns, shifted = state.num.shape[-1], operands.shift is not None
    reductions, reduced, long = None, None, operands.keys > FOLDED_KEYS
    if (reducing := operands.reducing) is not None:
        reductions, reduced = Reductions.of(reducing), Reduced.begin(reducing, state)
        columns, long = 0, False
    variant = Variant(query.shape[-1], columns, query.dtype, precise, long, False, False, *terms, shifted, reductions)
    unscaled = None
    if variant.numbers.split != "nothing":
        operands, unscaled = in_parts(operands, variant.numbers)
    asked, band = _Asked(variant, operands, state, unscaled, reduced), operands.band
    windowed = band is not None and not band.is_open_below(operands.rows)
    if band is None or windowed or variant.slopes:
        for part in _parts(asked._replace(variant=variant._replace(listed=True))):
            _attend_listed(part)
    elif band.lower < band.upper:
        rows, keys = operands.rows, operands.keys
        full = band.is_open_below(rows) and band.upper >= keys
        one_bias = operands.key_bias is None or len(operands.key_bias) == 1
        if reduced is None and full and one_bias and is_split(len(query), rows, keys, variant.tuning):
            _attend_split(asked._replace(variant=variant._replace(split=True)))
        else:
            _attend_band(asked, band)
    if reduced is not None:
        reduced.finish(state)


class _Asked(NamedTuple):
    """What is to be added to a state, or `reduced`; `unscaled` has the factors of operands in parts."""

    variant: Variant
    operands: Operands
    state: AttentionState
    unscaled: torch.Tensor | None
    reduced: Reduced | None = None


def _attend_band(asked: _Asked, band: Band) -> None:
    """Launch once for the keys of a band."""
    variant, operands, state, *_ = asked
    (group_size, rows, _), keys, tuning = operands.query.shape, operands.keys, variant.tuning
    band = Band(*(max(-rows, min(bound, keys)) for bound in band))  # more is the same
    span = choose_span(group_size, rows, keys, band, tuning)
    tiles = group_size * ceil_div(rows, tuning.rows)
    counters, items = 1 + tiles * tuning.consumers, tiles * ceil_div(keys, span)  # fewer where some attend nothing
    _check_count(operands, counters, items)
    turns = torch.zeros(counters, dtype=torch.int32, device=operands.query.device)
    addresses = (turns.data_ptr(), turns.data_ptr() + 4)
    _launch(asked, state_of(state), items, _call(asked, (span, *band), addresses))


def _attend_listed(asked: _Asked) -> None:
    """List the items on the GPU, then launch."""
    variant, operands, state, *_ = asked
    query, intervals, slopes = operands.query, operands.intervals, operands.slopes
    assert intervals is not None
    continued: AbstractContextManager[None] = nullcontext()
    if slopes is not None:
        intervals, distance = brought_near(intervals)
        if operands.shift is None:
            continued = continued_far_away(state, slopes, distance)
        else:
            nearer = replace(operands, shift=shifted_far_away(operands.shift, slopes, distance))
            asked = asked._replace(operands=nearer)
    listed = list_items(len(query), intervals, variant.tuning, query.device, positions=variant.slopes)
    items = _LISTED_OF_TILE * listed.layout.tiles * len(query)
    _check_count(operands, listed.layout.counters, listed.layout.most_items * len(query))
    call = _call(asked, (ceil_div(items, ITEMS), 0, 0), listed.addresses)
    with continued:
        _launch(asked, state_of(state), items, call)


def _attend_split(asked: _Asked) -> None:
    """Have each span of the keys attended by itself, by the rows of all heads, and merge what they give."""
    variant, operands, state, *_ = asked
    group_size, rows, head_dim = operands.query.shape
    packed = operands.query.reshape(1, group_size * rows, head_dim)
    shift = None if operands.shift is None else operands.shift.reshape(1, group_size * rows)
    for first in range(0, operands.keys, MOST_SPLIT_KEYS):
        part = slice(first, first + MOST_SPLIT_KEYS)
        bias = None if operands.key_bias is None else operands.key_bias[:, part]
        key, value = operands.key[part], operands.value[part]
        own = Operands(packed, key, value, operands.scores, key_bias=bias, shift=shift)
        span = split_span(own.rows, own.keys, variant.tuning)
        spans = ceil_div(own.keys, span)
        results = torch.empty(spans * own.rows * (variant.value_dim + 2), dtype=torch.float32, device=packed.device)
        of_spans = _state_of_spans(results.data_ptr(), spans, own.rows, variant.value_dim)
        items, of_part = spans * ceil_div(own.rows, variant.tuning.rows), asked._replace(operands=own)
        _launch(of_part, of_spans, items, _call(of_part, (span, -own.rows, own.keys), ()))
        gather(state, of_spans, spans)


def _state_of_spans(address: int, spans: int, rows: int, value_dim: int) -> State:
    """The num, den and max of each span, after one another: [spans, rows, Dv] and twice [spans, rows] float32."""
    den = address + 4 * spans * rows * value_dim
    return State(address, den, den + 4 * spans * rows, 0, 0, rows * value_dim, value_dim, rows, 1, rows, 1, 0, 0)


def _parts(asked: _Asked) -> Iterator[_Asked]:
    """The calls, one after another, that one launch each can hold: of rows, keys and heads."""
    _, operands, state, *_ = asked
    intervals, bias, shift = operands.intervals, operands.key_bias, operands.shift
    assert intervals is not None
    pieces = intervals.bounds.edges[:-1:MOST_PIECES].tolist()
    of_rows = [range(*ends) for ends in pairwise((*pieces, operands.rows)) if ends[0] < ends[1]]
    of_keys = [
        range(first, min(first + MOST_LISTED_KEYS, operands.keys)) for first in range(0, operands.keys, MOST_LISTED_KEYS)
    ]
    step = MOST_SLOPES if operands.slopes else len(operands.query)
    of_heads = [slice(first, first + step) for first in range(0, len(operands.query), step)]
    if len(of_rows) == len(of_keys) == len(of_heads) == 1:
        yield asked
        return
    for heads, rows, keys in product(of_heads, of_rows, of_keys):
        part = Operands(
            operands.query[heads, rows.start : rows.stop],
            operands.key[keys.start : keys.stop],
            operands.value[keys.start : keys.stop],
            operands.scores,
            intervals.part(rows, keys),
            operands.slopes and operands.slopes[heads],
            None if bias is None else bias[heads if len(bias) > 1 else slice(1), keys.start : keys.stop],
            shift=None if shift is None else shift[heads, rows.start : rows.stop],
        )
        of_part = state.heads(*heads.indices(len(operands.query))[:2]).rows(rows.start, rows.stop)
        first = heads.start or 0, rows.start, keys.start
        reduced = None if asked.reduced is None else asked.reduced.part(*first)
        yield asked._replace(operands=part, state=of_part, reduced=reduced)


def _check_count(operands: Operands, *counts: int) -> None:
    if max(operands.rows, operands.keys, *counts) > MOST_ROWS:
        raise ValueError(
            f"a call of {len(operands.query)} heads x {operands.rows} rows and {operands.keys} keys is too large: divide it"
        )


def _call(asked: _Asked, cut: tuple[int, int, int], addresses: Sequence[int]) -> _Call:
    """The argument `Call`: its `cut` is span, lower and upper, the addresses those of `Listed`, as many as are used."""
    variant, operands, _, unscaled, _ = asked
    call = _Call(len(operands.query), operands.rows, operands.keys, *cut)
    scale = operands.scores.scale
    call.scale, call.cap = scale * _LOG2E, 0.0
    if variant.softcap:
        cap = operands.scores.softcap
        assert cap is not None
        call.scale, call.cap = min(scale / cap, _LARGEST), cap * _LOG2E
    for name, address in zip(_ADDRESSES, addresses, strict=False):
        setattr(call, name, address)
    if unscaled is not None:
        call.unscaled = unscaled.data_ptr()
    if operands.shift is not None:
        call.shift, call.shift_head = operands.shift.data_ptr(), operands.shift.stride(0)
    if operands.key_bias is not None:
        bias = operands.key_bias
        call.bias, call.bias_head = bias.data_ptr(), bias.stride(0) if len(bias) > 1 else 0
    for head, slope in enumerate(operands.slopes or ()):
        call.slopes[head] = -slope * _LOG2E
    return call


def _launch(asked: _Asked, state: State, items: int, call: _Call) -> None:
    variant, operands, _, _, reduced = asked
    tuning, device = variant.tuning, operands.query.device
    keys, values = operands.key.unsqueeze(0), operands.value.unsqueeze(0)
    maps = [tensor_map(operands.query, tuning.rows), tensor_map(keys, tuning.keys)]
    if reduced is None:
        kernel, arguments = "attend", (*maps, tensor_map(values, tuning.keys), state, call)
    else:
        kernel, arguments = "survey", (*maps, state, reduced.argument(asked.state), call)
    # A block for each multiprocessor to spare: so the last items are not left to those that have taken few.
    blocks = items if variant.split else ceil_div(items, ITEMS) + _multiprocessors(device)
    threads, early = 128 * (tuning.consumers + 1), variant.split or variant.listed
    program_for(variant).launch(kernel, device, blocks, threads, arguments, early=early)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def program_for(variant: Variant) -> Program:
    """Make hopper.cu, or survey.cu, for a variant."""
    tuning, reductions = variant.tuning, variant.reductions
    macros = {
        "HEAD_DIM": variant.head_dim,
        "VALUE_DIM": variant.value_dim,
        "CONSUMERS": tuning.consumers,
        "KEYS": tuning.keys,
        "STAGES": tuning.stages,
        "PARTS": tuning.numbers.parts,
        "WEIGHT_PARTS": tuning.numbers.weight_parts,
        "SCALED": int(tuning.numbers.split != "nothing"),
        "RESTART": tuning.restart,
        "FOLD": tuning.fold,
        "ITEMS": ITEMS,
        "BFLOAT16": int(variant.dtype == torch.bfloat16),
        "VALUES_BFLOAT16": int(variant.dtype == torch.bfloat16 and tuning.numbers.split == "nothing"),
        **{name.upper(): int(getattr(variant, name)) for name in _SWITCHES},
        "MOST_SLOPES": MOST_SLOPES,
        "SHARED_BYTES": tuning.shared_bytes,
        **({} if reductions is None else reductions.macros),
    }
    source = "hopper.cu" if reductions is None else "survey.cu"
    return Program(source, macros, variant="a", shared_bytes=tuning.shared_bytes)
