"""How a call of `attend` is cut into tiles that are computed one by one; pure integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_QUANTUM = 256  # a multiple of every library's own tiles


class Tile(NamedTuple):
    """Rows [first_row, last_row) attend keys [first_key, last_key): all of them, or, on the diagonal, up to their own."""

    first_row: int
    last_row: int
    first_key: int
    last_key: int
    diagonal: bool


def make_tiles(rows: int, keys: int, row_step: int, key_step: int, *, diagonal: bool) -> Iterator[Tile]:
    """Tiles of at most row_step x key_step that cover the call, each pair of row and key once, the largest first.

    In a diagonal call rows = keys, and the tiles on the diagonal are triangles of key_step rows.
    """
    for first_key in range(0, keys, key_step):
        last_key = min(first_key + key_step, keys)
        if diagonal:
            yield Tile(first_key, last_key, first_key, last_key, True)
        for first_row in range(last_key if diagonal else 0, rows, row_step):
            yield Tile(first_row, min(first_row + row_step, rows), first_key, last_key, False)


def round_up(count: int, quantum: int) -> int:
    """The next multiple of `quantum`."""
    return -(-count // quantum) * quantum


def level_step(total: int, most: int) -> int:
    """The step that cuts `total` into the fewest pieces of at most `most` (a multiple of 256), without a thin last one."""
    pieces = max(1, -(-total // most))
    if pieces == 1:
        return max(1, total)
    return round_up(-(-total // pieces), _QUANTUM)
