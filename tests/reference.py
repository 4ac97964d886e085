"""Attention in float64, written from the formula alone: what the tests compare the package with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array64 = NDArray[np.float64]


def attention64(
    q: NDArray[np.generic], k: NDArray[np.generic], v: NDArray[np.generic], causal: bool, scale: float
) -> tuple[Array64, Array64]:
    """out [B, Hq, N, D] and lse [B, Hq, N] of q [B, Hq, N, D] and k, v [B, Hkv, N, D]."""
    group = q.shape[1] // k.shape[1]
    query = q.astype(np.float64)
    key, value = (np.repeat(array.astype(np.float64), group, axis=1) for array in (k, v))
    scores = scale * np.einsum("bhid,bhjd->bhij", query, key, optimize=True)
    if causal:
        tokens = np.arange(q.shape[2])
        scores[..., tokens[:, None] < tokens] = -np.inf
    maximum = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhij,bhjd->bhid", weights / total, value, optimize=True)
    return out, (maximum + np.log(total))[..., 0]


def relative_error(found: NDArray[np.generic], expected: Array64) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
