"""Calls of kernels, full and up to a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Causal, Mask, Ramp
from oocattn.problem.scores import Scores


def triangle(rows: int) -> Intervals:
    """The intervals of a call in which row i attends keys 0..i."""
    return make_intervals(Causal(rows, rows), range(rows), range(rows))


@dataclass(frozen=True)
class Windows(Mask):
    """The keys before `prefix`, and those from `left` before a row's own position to `right` behind it."""

    left: int
    right: int
    prefix: int = 0

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        offset, end = self.keys - self.queries, Ramp.constant(self.prefix)
        start, stop = (Ramp(offset + moved, self.prefix, self.keys) for moved in (-self.left, self.right + 1))
        return Ramp.constant(0), end, start, stop

    def __str__(self) -> str:
        return f"windows {self.left}, {self.right}, prefix {self.prefix}"


MASKS = (
    Causal(1000, 1000),
    Causal(700, 1300),  # every row attends 600 keys and more
    Causal(1300, 700),  # the first rows attend none
    Windows(1000, 1000, 50, 0),
    Windows(900, 1500, 300, 200),
    Windows(1500, 900, 10, -5),
    Windows(1000, 1000, 100, 3, 200),
)
"""Masks of every kind of interval: an end or both that move, or two intervals; some rows without a key."""


def attended(intervals: Intervals, keys: int) -> torch.Tensor:
    """Which of so many keys each row attends: bool [n, keys]."""
    a, b, c, d = torch.from_numpy(intervals.values()).unsqueeze(-1).unbind(1)
    key = torch.arange(keys)
    return ((a <= key) & (key < b)) | ((c <= key) & (key < d))


def call(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: AttentionState,
    *,
    scale: float,
    causal: bool = False,
) -> None:
    """Have a kernel attend all keys with every row or, where `causal`, keys 0..i with row i of as many."""
    intervals = triangle(query.shape[1]) if causal else None
    kernel.attend(Operands(query, key, value, Scores(scale), intervals), state)
