"""Rows that lie too far from the keys of a call for the kernel to count how far, in 32 bits.

ALiBi's term of the distance that all keys of such a row share is then left out of the call: the row's maximum in the state
is raised by it before, and lowered afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from oocattn.kernels.intervals import Intervals
from oocattn.kernels.state import AttentionState
from oocattn.problem.bounds import Int64s

_FAR = 1 << 30  # positions up to it are counted in the kernel
_MOST_LOST = 30.0  # of a logarithm that float32 rounds, such as 1e12: its sums stay finite


def brought_near(intervals: Intervals) -> tuple[Intervals, Int64s]:
    """Intervals whose positions 32 bits hold, and by how much each row [rows] lies nearer to all keys."""
    bounds = intervals.bounds
    first, last = bounds.edges[:-1] + bounds.position, bounds.edges[1:] - 1 + bounds.position  # the positions of a piece
    moved = np.maximum(first - intervals.keys, 0) + np.minimum(last, 0)  # of its rows, all after or all before the keys
    moved[np.abs(bounds.position) <= _FAR] = 0
    near = replace(intervals, bounds=replace(bounds, position=bounds.position - moved))
    return near, np.repeat(np.abs(moved), np.diff(bounds.edges))


@contextmanager
def continued_far_away(state: AttentionState, slopes: Sequence[float], distance: Int64s) -> Iterator[None]:
    """Have a state continued by scores that lack -slope * distance [rows], for the slope of each head."""
    if not distance.any():
        yield
        return
    less = torch.from_numpy(np.outer(np.array(slopes, np.float64), distance))
    less = less.pin_memory().to(state.max.device, non_blocking=True) if state.max.is_cuda else less
    before = state.max.clone()
    raised = (before + less).float()
    state.max.copy_(raised)
    yield
    # A maximum that stayed is what it was. Another one is rounded beside a large term, and the sums are of its shift.
    stayed = state.max == raised
    lost = less.neg_().add_(state.max)
    lowered = lost.float()
    lost.sub_(lowered).nan_to_num_(0.0, 0.0, 0.0).clamp_(-_MOST_LOST, _MOST_LOST).masked_fill_(stayed, 0.0)
    factor = lost.exp_().float()
    state.num.mul_(factor.unsqueeze(-1))
    state.den.mul_(factor)
    state.max.copy_(torch.where(stayed, before, lowered))


def shifted_far_away(shift: torch.Tensor, slopes: Sequence[float], distance: Int64s) -> torch.Tensor:
    """Shifts [g, n] of scores that lack -slope * distance [rows], for the slope of each head."""
    if not distance.any():
        return shift
    lacking = torch.from_numpy(np.outer(np.array(slopes, np.float64), distance))
    lacking = lacking.pin_memory().to(shift.device, non_blocking=True) if shift.is_cuda else lacking
    return lacking.add_(shift).float()
