"""The pair ledger: which keys each row has attended.

It holds their number and the sum of their indices modulo 2^64.

The number finds a lost or doubled subproblem, the sum one that attended other keys than it should. Both come from the mask's
closed forms, are entered beside the call that attends the keys, and are merged with the state that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from oocattn.kernels import AttentionState
from oocattn.operations.tiles import Tile, pieces
from oocattn.problem.mask import Cover, Int64s

ROWS = 8192
"""Rows whose numbers are computed at a time: some hundred kilobytes."""

Expected = tuple[Int64s, Int64s]
"""Of consecutive rows, how many keys each attends, and the sum of their indices: int64 [n] each."""


@dataclass(frozen=True)
class Ledger:
    """The ledger of consecutive rows in host memory, as int64 [n] each."""

    keys: Int64s
    key_sum: Int64s

    @classmethod
    def of_state(cls, state: AttentionState) -> Ledger:
        """The ledger of a state in host memory; a tile is entered in the state."""
        return cls(state.keys.numpy(), state.key_sum.numpy())

    @classmethod
    def carve(cls, memory: torch.Tensor) -> Ledger:
        """An undefined ledger in host memory of 16 bytes a row, uint8 [16 n]."""
        return cls(*memory.view(torch.int64).view(2, -1).numpy())

    def rows(self, start: int, stop: int) -> Ledger:
        """Rows [start, stop) as views."""
        return Ledger(self.keys[start:stop], self.key_sum[start:stop])

    def reset(self) -> None:
        """Forget every key."""
        self.keys.fill(0)
        self.key_sum.fill(0)

    def enter(self, tile: Tile) -> None:
        """Enter the keys that the rows of a tile attend."""
        if tile.cover is Cover.FULL:
            rows = slice(tile.rows.start, tile.rows.stop)
            self.keys[rows] += len(tile.keys)
            self.key_sum[rows] += _wrapped(sum(len(run) * (run.start + run.stop - 1) // 2 for run in tile.key_tokens))
            return
        (keys,) = tile.key_tokens
        for tokens in pieces(tile.row_tokens, ROWS):
            first = tile.rows.start + tokens.start - tile.row_tokens.start
            rows = slice(first, first + len(tokens))
            self.keys[rows] += tile.mask.counts(tokens, keys)
            self.key_sum[rows] += tile.mask.index_sums(tokens, keys)

    def first_wrong(self, tokens: range, expected: Callable[[range], Expected]) -> int | None:
        """The first row, of these tokens, whose ledger is wrong; None if there is none."""
        for part in pieces(tokens, ROWS):
            rows = slice(part.start - tokens.start, part.stop - tokens.start)
            keys, key_sum = expected(part)
            right = (self.keys[rows] == keys) & (self.key_sum[rows] == key_sum)
            if not right.all():
                return rows.start + int(np.argmin(right))
        return None


def _wrapped(number: int) -> int:
    """The signed number of 64 bits that is equal to `number` modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
