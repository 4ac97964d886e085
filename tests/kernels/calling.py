"""Calls of kernels, full and up to a diagonal."""

from __future__ import annotations

import torch

from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores


def triangle(rows: int) -> Intervals:
    """The intervals of a call in which row i attends keys 0..i."""
    return make_intervals(Mask.of(rows, rows, causal=True), range(rows), range(rows))


MASKS = (
    Mask.of(1000, 1000, causal=True),
    Mask.of(700, 1300, causal=True),  # every row attends 600 keys and more
    Mask.of(1300, 700, causal=True),  # the first rows attend none
    Mask.of(1000, 1000, causal=True, left=50),
    Mask.of(900, 1500, left=300, right=200),
    Mask.of(1500, 900, left=10, right=0),
    Mask.of(1000, 1000, left=100, right=3, prefix=200),
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
