"""The tiles of a call of `attend`, computed one by one; pure integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from oocattn.units import ceil_div, round_up

_QUANTUM = 256  # a multiple of every library's own tiles


class Tile(NamedTuple):
    """Rows [first_row, last_row) attend keys [first_key, last_key): all of them, or those of a lower triangle."""

    first_row: int
    last_row: int
    first_key: int
    last_key: int
    triangular: bool


def make_tiles(rows: int, keys: int, row_step: int, key_step: int, *, upper: int) -> Iterator[Tile]:
    """The tiles of a call in which row i attends the first i + upper keys: row_step rows and key_step keys at most.

    The triangles are squares of key_step at most. With upper = keys every row attends every key.
    """
    shared = keys if upper >= keys else max(0, upper - 1)  # keys that all rows attend and that no triangle has
    for first, last in _steps(0, shared, key_step):
        yield from (Tile(row, end, first, last, False) for row, end in _steps(0, rows, row_step))
    for first, last in _steps(shared, min(keys, rows + upper - 1), key_step):
        row, end = first - upper + 1, last - upper + 1
        yield Tile(row, end, first, last, True)
        yield from (Tile(start, stop, first, last, False) for start, stop in _steps(end, rows, row_step))


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def level_step(total: int, most: int) -> int:
    """The step, a multiple of 256, that cuts `total` into fewest pieces up to `most`."""
    pieces = ceil_div(total, most)
    return round_up(ceil_div(total, pieces), _QUANTUM) if pieces > 1 else max(1, total)
