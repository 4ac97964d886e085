"""The pair ledger: the number of keys that each row has attended, and the sum of their indices modulo 2^64.

The number finds a lost or doubled subproblem, the sum one that attended other keys than it should. Both come from the mask's
closed forms, beside the call that attends the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from oocattn.kernels.merging import enter
from oocattn.kernels.state import AttentionState
from oocattn.operations.tiles import Tile, pieces
from oocattn.problem.mask import Cover, Int64s

ROWS = 8192  # rows whose numbers are computed at a time: some hundred kilobytes

ExpectedLedger = tuple[Int64s, Int64s]  # keys that consecutive rows attend, and sums of their indices: int64 [n] each


def enter_tile(state: AttentionState, tile: Tile) -> None:
    """Enter the keys that the rows of a tile attend in the ledger of their state."""
    if tile.cover is Cover.FULL:
        key_sum = sum(len(run) * (run.start + run.stop - 1) // 2 for run in tile.key_tokens)
        enter(state, tile.row_tokens.start, (), keys=len(tile.keys), key_sum=key_sum)
        return
    (keys,) = tile.key_tokens
    enter(state, tile.row_tokens.start, [ramp.clipped(keys) for ramp in tile.mask.ramps])


def find_wrong_row(state: AttentionState, tokens: range, expected: Callable[[range], ExpectedLedger]) -> int | None:
    """The first row whose ledger, in host memory, is wrong; None if there is none."""
    found_keys, found_sum = state.keys.numpy(), state.key_sum.numpy()
    for part in pieces(tokens, ROWS):
        rows = slice(part.start - tokens.start, part.stop - tokens.start)
        keys, key_sum = expected(part)
        right = (found_keys[rows] == keys) & (found_sum[rows] == key_sum)
        if not right.all():
            return rows.start + int(np.argmin(right))
    return None
