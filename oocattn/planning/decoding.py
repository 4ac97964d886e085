"""Chunks of the inputs that lie across those of a plan, and are decoded for each of these. Pure arithmetic.

Chunks that are compressed, in shards or remote are decoded whole. Where heads are held in memory (`interleaving.py`), they
are read in whole chunks, each once.
"""

from __future__ import annotations

from functools import cache

from oocattn.planning.live import ChunkGrid, kept_with_mask, keys_needed, row_edges
from oocattn.problem.bounds import merge_ranges
from oocattn.problem.mask import Mask
from oocattn.units import ceil_div


@cache
def times_decoded(tokens: int, rows: int, unit: int) -> float:
    """How often chunks of `unit` tokens are decoded, in the mean, to read all `tokens` once, `rows` at a time."""
    if tokens == 0 or rows % unit == 0:
        return 1.0
    touched = sum(ceil_div(min(low + rows, tokens), unit) - low // unit for low in range(0, tokens, rows))
    return touched / ceil_div(tokens, unit)


def times_keys_decoded(mask: Mask, grid: ChunkGrid, unit: int) -> float:
    """How often the keys that query chunks attend are decoded, in chunks of `unit`: at edges of a window for few of them."""
    times = times_decoded(mask.keys, grid.key_chunk_rows, unit)
    if unit == 1 or mask.is_simple:
        return times
    needed = keys_needed(mask, grid, grid.chunk_rows)[0]
    return max(times, _keys_touched(mask, grid, unit) / max(1, needed))


@kept_with_mask
def _keys_touched(mask: Mask, grid: ChunkGrid, unit: int) -> int:
    """Keys of the chunks of `unit` keys in which those lie that any row of a query chunk attends, over all of these."""
    owners, starts, stops = mask.live_keys_between(row_edges(grid, grid.chunk_rows))
    apart = owners * (ceil_div(mask.keys, unit) + 1)  # so chunks of two owners never touch
    begin, end = merge_ranges(apart + starts // unit, apart - (-stops // unit))
    return int((end - begin).sum()) * unit


def describe_decoding(times: float, unit: int, rows: int) -> str:
    """A plan's line on chunks that are decoded more than once; empty where they hardly are."""
    if times < 1.05:
        return ""
    return (
        f"decoded      {times:.3g} times over: chunks of the inputs have {unit:,} tokens, those of the plan {rows:,}; once "
        "with chunks that are a multiple, by a larger budget or fewer --chunks"
    )
