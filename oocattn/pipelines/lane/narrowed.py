"""Counts of elements that a dtype made Inf or 0."""

from __future__ import annotations

import torch

from oocattn.kernels.state import AttentionState

_BLOCK = 1 << 16  # elements of temporary arrays, which stay small


def count_narrowed(state: AttentionState, out: torch.Tensor, lse: torch.Tensor, not_finite: int) -> tuple[int, int]:
    """Count the elements of `out` [g, n, D] that its dtype made Inf, and 0: the state gives another float32 value.

    `lse` [g, n] has the denominator of the row, with its sink.

    Where none are `not_finite`, and few zeros (0.5%), nothing is counted: it takes time.
    """
    if out.dtype == torch.float32:
        return 0, 0
    if not not_finite and out.numel() - int(torch.count_nonzero(out)) <= out.numel() / 200:
        return 0, 0
    rows = max(1, _BLOCK // out.shape[-1])
    overflowed = underflowed = 0
    for start in range(0, out.shape[1], rows):
        block, narrow = state.rows(start, start + rows), out[:, start : start + rows]
        wide = block.num * torch.exp(block.max - lse[:, start : start + rows]).unsqueeze(-1)
        overflowed += int((narrow.isinf() & wide.isfinite()).sum())
        underflowed += int(((narrow == 0) & (wide.abs() > 0)).sum())
    return overflowed, underflowed
