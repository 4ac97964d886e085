"""Chunks of the inputs that lie across those of a plan, and are decoded for each of these. Pure arithmetic.

Chunks that are compressed, in shards or remote are decoded whole. Where heads are held in memory (`interleaving.py`), they
are read in whole chunks, each once.
"""

from __future__ import annotations

from functools import cache

from oocattn.units import ceil_div


@cache
def times_decoded(tokens: int, rows: int, unit: int) -> float:
    """How often chunks of `unit` tokens are decoded, in the mean, to read all `tokens` once, `rows` at a time."""
    if rows % unit == 0:
        return 1.0
    touched = sum(ceil_div(min(low + rows, tokens), unit) - low // unit for low in range(0, tokens, rows))
    return touched / ceil_div(tokens, unit)


def describe_decoding(times: float, unit: int, rows: int) -> str:
    """A plan's line on chunks that are decoded more than once; empty where they hardly are."""
    if times < 1.05:
        return ""
    return (
        f"decoded      {times:.3g} times over: chunks of the inputs have {unit:,} tokens, those of the plan {rows:,}; once "
        "with chunks that are a multiple, by a larger budget or fewer --chunks"
    )
