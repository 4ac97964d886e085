"""Calls of kernels, full and up to a diagonal."""

from __future__ import annotations

import torch

from oocattn.kernels import AttentionState, Kernel
from oocattn.kernels.intervals import make_intervals
from oocattn.problem.mask import Causal
from oocattn.problem.scores import Scores


def triangle(rows: int) -> torch.Tensor:
    """The intervals of a call in which row i attends keys 0..i."""
    return make_intervals(Causal(rows, rows), range(rows), range(rows))


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
    kernel.attend(query, key, value, state, scores=Scores(scale), intervals=intervals)
