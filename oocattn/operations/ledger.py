"""The pair ledger: the number of keys that each row has attended, and the sum of their indices modulo 2^64.

The number finds a lost or doubled subproblem, the sum one that attended other keys than it should. Both come from the mask's
closed forms, beside the call that attends the keys.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from oocattn.kernels.merging import enter
from oocattn.kernels.state import AttentionState
from oocattn.operations.tiles import Tile, pieces
from oocattn.problem.bounds import LARGEST, Bounds, Int64s, sums_before
from oocattn.problem.mask import Cover, Mask

MOST_PIECES = 64  # documents of a block of rows that are looked at one by one

ROWS_OF_MANY = 1 << 15  # rows of more documents that are looked at together: their numbers take some megabytes


def enter_tile(state: AttentionState, tile: Tile) -> None:
    """Enter the keys that the rows of a tile attend in the ledger of their state."""
    if tile.cover is Cover.FULL:
        key_sum = sum(len(run) * (run.start + run.stop - 1) // 2 for run in tile.key_tokens)
        enter(state, None, keys=len(tile.keys), key_sum=key_sum)
        return
    enter(state, tile.ledger)


class LedgerChecker:
    """Compares ledgers with a mask, in memory of its own that is used again: threads that allocate wait for each other.

    It has memory for `rows` at a time.
    """

    def __init__(self, rows: int) -> None:
        self._row = np.arange(rows, dtype=np.int64)
        self._numbers = np.empty((3, rows), np.int64)
        self._same = np.empty(rows, bool)

    def find_wrong_row(self, state: AttentionState, tokens: range, mask: Mask) -> int | None:
        """The first row whose ledger, in host memory, is wrong; None if there is none."""
        keys, key_sum = state.keys.numpy(), state.key_sum.numpy()
        for part in pieces(tokens, len(self._row)):
            bounds = mask.bounds(part)
            if len(bounds.start) > MOST_PIECES or mask.keys > LARGEST:
                rows = slice(part.start - tokens.start, part.stop - tokens.start)
                wrong = _find_in_many(keys[rows], key_sum[rows], bounds, part)
                if wrong is not None:
                    return rows.start + wrong
                continue
            for piece, (first, last) in enumerate(pairwise((bounds.edges - tokens.start).tolist())):
                wrong = self._compare(keys[first:last], key_sum[first:last], bounds, piece)
                if wrong is not None:
                    return int(first) + wrong
        return None

    def _compare(self, keys: Int64s, key_sum: Int64s, bounds: Bounds, piece: int) -> int | None:
        """Compare the rows of one piece as `Bounds.ledger` does."""
        stop, resume, product = self._numbers[:, : len(keys)]
        row, same = self._row[: len(keys)], self._same[: len(keys)]
        for ramp, bound in ((bounds.stop, stop), (bounds.resume, resume)):
            np.add(row, bounds.edges[piece] + ramp.offset[piece], out=bound)
            np.clip(bound, ramp.least[piece], ramp.most[piece], out=bound)
        np.subtract(stop, resume, out=product)  # keys that are attended, but for the fixed ones
        product += bounds.fixed[piece] - bounds.start[piece]
        wrong = _first_wrong(np.equal(product, keys, out=same))
        # Sums of the indices before a and before b differ by (a - b)(a + b - 1) / 2.
        np.subtract(stop, resume, out=product)
        stop += resume
        stop -= 1
        product *= stop
        product >>= 1
        product += (sums_before(bounds.fixed) - sums_before(bounds.start))[piece]
        earlier = _first_wrong(np.equal(product, key_sum, out=same)[:wrong])
        return wrong if earlier is None else earlier


def _find_in_many(keys: Int64s, key_sum: Int64s, bounds: Bounds, tokens: range) -> int | None:
    """The first row whose numbers are not those of its token, where tokens are of many documents."""
    for part in pieces(tokens, ROWS_OF_MANY):
        rows = slice(part.start - tokens.start, part.stop - tokens.start)
        expected, expected_sum = bounds.part(part).ledger()
        wrong = _first_wrong((keys[rows] == expected) & (key_sum[rows] == expected_sum))
        if wrong is not None:
            return rows.start + wrong
    return None


def _first_wrong(same: npt.NDArray[np.bool_]) -> int | None:
    return None if same.all() else int(np.argmin(same))
