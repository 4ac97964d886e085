"""How calls of our own kernel on Hopper GPUs are cut: tiles of rows, spans of keys, items of both; pure integers."""

from __future__ import annotations

import heapq
from functools import lru_cache

from oocattn.kernels.cuda.tuning import FOLDED_KEYS, PANEL, Numbers, Tuning
from oocattn.kernels.intervals import Band
from oocattn.problem.calls import CallSize
from oocattn.units import ceil_div, round_up

PROCESSORS = 132  # multiprocessors to choose spans for, on any GPU, so that all give the same bits
ITEMS = 4  # items of a block; then it ends, and small kernels of other streams get in
PART_NUMBERS = 5  # of operands in parts: the largest numbers of three tensors, two factors
COUNTERS = 3  # of a listed call: the next item, tiles that are listed, items that are
FEWEST_STEPS = 16  # of an item of a listed call that is cut
_ITEM_STEPS = 3  # cost of an item beside its steps, in steps: fill the pipeline, add the state
_CHOICES, _MANY_ITEMS = 8, 20  # numbers of spans to try, and items per multiprocessor that make any do

MOST_LISTED_KEYS = 1 << 20  # of a listed call: bounds.cu has places for the turns of so many
MOST_SPLIT_KEYS = 1 << 17  # of a split call: its spans' results are kept at once
_SPLIT_ROWS, _SPLIT_TILES = 256, 8  # rows of a head, and tiles of all heads, up to which a full call is split
_FEWEST_SPLIT_KEYS = 4096


@lru_cache(4096)
def choose_span(group_size: int, rows: int, keys: int, band: Band, tuning: Tuning) -> int:
    """Keys of a span; of few items, the span with which they fill the multiprocessors best."""
    fewest, tiles = ceil_div(keys, most_steps(tuning) * tuning.keys), group_size * ceil_div(rows, tuning.rows)
    times: dict[int, int] = {}
    for spans in range(fewest, fewest + _CHOICES):
        span = round_up(ceil_div(keys, spans), tuning.keys)
        if tiles * spans > _MANY_ITEMS * PROCESSORS:
            return min(times, key=times.__getitem__, default=span)
        times[span] = _makespan(steps_of_items(group_size, rows, keys, band, tuning, span))
    return min(times, key=times.__getitem__)


def steps_of_items(group_size: int, rows: int, keys: int, band: Band, tuning: Tuning, span: int) -> list[int]:
    """Steps of the items of a call, in the order in which hopper.cu takes them."""
    tile, step = tuning.rows, tuning.keys
    attended = [  # by the rows of each tile
        (max(0, row + band.lower), min(keys, min(rows, row + tile) - 1 + band.upper)) for row in range(0, rows, tile)
    ]
    return [
        ceil_div(min(first + span, stop) - max(first, start - start % step), step)
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


def most_steps(tuning: Tuning) -> int:
    """Steps of an item."""
    return tuning.span // tuning.keys


def most_listed(group_size: int, rows: int, keys: int, tuning: Tuning) -> int:
    """The most items of a head that bounds.cu lists for a call of so many keys or fewer."""
    tiles = ceil_div(rows, tuning.rows)
    full = tiles * (ceil_div(keys, tuning.keys) + 1) // (FOLDED_KEYS // tuning.keys)
    return tiles + max(full, 2 * PROCESSORS // group_size) + 1


def is_split(group_size: int, rows: int, keys: int, tuning: Tuning) -> bool:
    """Whether a full call has too few rows to fill the GPU, so that each span has a result of its own, merged afterwards."""
    tiles = ceil_div(group_size * rows, tuning.rows)
    return rows <= _SPLIT_ROWS and tiles <= _SPLIT_TILES and keys >= _FEWEST_SPLIT_KEYS


def split_span(rows: int, keys: int, tuning: Tuning) -> int:
    """Keys of a span of a split call, with `rows` of all heads: so many that each multiprocessor has one item."""
    spans = max(PROCESSORS // ceil_div(rows, tuning.rows), ceil_div(keys, most_steps(tuning) * tuning.keys))
    return round_up(ceil_div(keys, spans), tuning.keys)


def _part_bytes(call: CallSize, numbers: Numbers) -> tuple[int, ...]:
    """Bytes of the tensors that `in_parts` of parts.py allocates."""
    key_row, value_row = (2 * numbers.parts * round_up(dim, PANEL) for dim in (call.head_dim, call.value_dim))
    queries_and_keys = (call.group_size * call.rows * key_row, call.keys * key_row) if numbers.split == "all" else ()
    return 4 * PART_NUMBERS, *queries_and_keys, call.keys * value_row


def scratch_sizes(call: CallSize, tuning: Tuning) -> tuple[int, ...]:
    """Bytes of the tensors that a call, or a smaller one, allocates: parts, counters, results of spans, listed items."""
    heads, tile = call.group_size, tuning.rows
    tiles = ceil_div(call.rows, tile)
    sizes = [4 * (COUNTERS + heads * tiles * tuning.consumers)]
    if tuning.numbers.split != "nothing":
        sizes += _part_bytes(call, tuning.numbers)
    if call.keys >= _FEWEST_SPLIT_KEYS:
        rows = min(heads * min(call.rows, _SPLIT_ROWS), _SPLIT_TILES * tile)
        results = min(PROCESSORS * tile, ceil_div(call.keys, tuning.keys) * rows)
        sizes += [4 * results * (call.value_dim + 2), 2 * tuning.numbers.parts * rows * round_up(call.head_dim, PANEL)]
    if call.masked or not call.plain:
        items = most_listed(heads, call.rows, min(call.keys, MOST_LISTED_KEYS), tuning)
        sizes.append(4 * (4 + (not call.plain)) * tiles * tile + 16 * (2 * tiles + items))
    if not call.plain:
        sizes += [8 * heads * call.rows] * 5  # of rows that lie far away
    return tuple(sizes)
