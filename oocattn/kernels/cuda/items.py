"""How calls of our own kernel on Hopper GPUs are cut: tiles of rows, spans of keys, items of both; pure integers."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

from oocattn.kernels.intervals import Band
from oocattn.problem.calls import CallSize
from oocattn.units import ceil_div, round_up

PANEL = 64  # columns that are loaded at a time
ROWS_OF_CONSUMER = 64  # of a tile, for each group of warps that multiplies
KEYS_OF_STEP = 128  # `KEYS` of items.cuh
MOST_SPAN = 16_384  # keys of one accumulation: its error is a third of the weights' (NOTES.md)
PROCESSORS = 132  # multiprocessors to choose spans for, on any GPU, so that all give the same bits
ITEMS = 4  # items of a block; then it ends, and small kernels of other streams get in
COUNTERS = 3  # of a listed call: the next item, tiles that are listed, items that are
FEWEST_STEPS = 16  # of an item of a listed call that is cut
_ITEM_STEPS = 3  # cost of an item beside its steps, in steps: fill the pipeline, add the state
_CHOICES, _MANY_ITEMS = 8, 20  # numbers of spans to try, and items per multiprocessor that make any do

MOST_LISTED_KEYS = 1 << 20  # of a listed call: bounds.cu has places for the turns of so many
MOST_SPLIT_KEYS = 1 << 17  # of a split call: its spans' results are kept at once
_SPLIT_ROWS, _SPLIT_TILES = 256, 8  # rows of a head, and tiles of all heads, up to which a full call is split
_FEWEST_SPLIT_KEYS = 4096


@dataclass(frozen=True)
class Tuning:
    """The cut of the program for one number of value columns."""

    consumers: int
    stages: int
    ring: bool

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return ROWS_OF_CONSUMER * self.consumers


def tuning_for(value_dim: int, *, plain: bool) -> Tuning:
    """The tuning for values of so many columns; terms of a score need the registers of a third consumer."""
    three = value_dim <= PANEL and plain
    return Tuning(consumers=3, stages=2, ring=True) if three else Tuning(consumers=2, stages=2, ring=False)


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


def most_listed(group_size: int, rows: int, keys: int, tile: int) -> int:
    """The most items of a head that bounds.cu lists."""
    tiles = ceil_div(rows, tile)
    full = tiles * (ceil_div(keys, KEYS_OF_STEP) + 1) * KEYS_OF_STEP // MOST_SPAN
    return tiles + max(full, 2 * PROCESSORS // group_size) + 1


def is_split(group_size: int, rows: int, keys: int, tile: int) -> bool:
    """Whether a full call has too few rows to fill the GPU, so that each span has a result of its own, merged afterwards."""
    return rows <= _SPLIT_ROWS and ceil_div(group_size * rows, tile) <= _SPLIT_TILES and keys >= _FEWEST_SPLIT_KEYS


def split_span(rows: int, keys: int, tile: int) -> int:
    """Keys of a span of a split call, with `rows` of all heads: so many that each multiprocessor has one item."""
    spans = max(PROCESSORS // ceil_div(rows, tile), ceil_div(keys, MOST_SPAN))
    return round_up(ceil_div(keys, spans), KEYS_OF_STEP)


def scratch_sizes(call: CallSize) -> tuple[int, ...]:
    """Bytes of the tensors that a call, or a smaller one, allocates: counters, results of spans, listed items."""
    tuning = tuning_for(call.value_dim, plain=call.plain)
    heads, tile = call.group_size, tuning.rows
    tiles = ceil_div(call.rows, tile)
    sizes = [4 * (COUNTERS + heads * tiles * tuning.consumers)]
    if call.keys >= _FEWEST_SPLIT_KEYS:
        rows = min(heads * min(call.rows, _SPLIT_ROWS), _SPLIT_TILES * tile)
        results = min(PROCESSORS * tile, ceil_div(call.keys, KEYS_OF_STEP) * rows)
        sizes += [4 * results * (call.value_dim + 2), 2 * rows * call.head_dim]
    if call.masked or not call.plain:
        items = most_listed(heads, call.rows, min(call.keys, MOST_LISTED_KEYS), tile)
        sizes.append(4 * (4 + (not call.plain)) * tiles * tile + 16 * (2 * tiles + items))
    if not call.plain:
        sizes += [8 * heads * call.rows] * 5  # of rows that lie far away
    return tuple(sizes)
