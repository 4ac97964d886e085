"""Attention in float64, written from the formula alone: what the tests compare the package with.

The mask is a dense matrix, a condition for each pair; nothing of the package is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array64 = NDArray[np.float64]
Bools = NDArray[np.bool_]


def attention_by_definition(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    key_bias: NDArray[Any] | None = None,
    learnable_sink: ArrayLike | None = None,
    scale: float | None = None,
    queries: tuple[int, int] | None = None,
    heads: Sequence[int] | None = None,
    **mask: Any,
) -> tuple[Array64, Array64]:
    """out [B, heads, queries, Dv] and lse [B, heads, queries] of q [B, Hq, Nq, D], k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv].

    `mask` has the arguments of `mask_by_definition`. Slopes and sinks are float32. Rows without a key have out 0 and lse
    -inf, or the sink of their head.
    """
    (batch, query_heads, rows, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    attended, distance = mask_by_definition(batch, rows, keys, **mask)
    asked = slice(*queries) if queries is not None else slice(0, rows)
    chosen = range(query_heads) if heads is None else heads
    scale = head_dim**-0.5 if scale is None else scale
    out = np.empty((batch, len(chosen), rows, v.shape[3]))[:, :, asked]
    lse = np.empty(out.shape[:3])
    for b in range(batch):
        for place, head in enumerate(chosen):
            kv_head = head // (query_heads // kv_heads)
            query, key, value = (array.astype(np.float64) for array in (q[b, head, asked], k[b, kv_head], v[b, kv_head]))
            with np.errstate(all="ignore"):
                scores = scale * (query @ key.T)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slopes = np.broadcast_to(np.asarray(alibi_slopes, np.float32), (batch, query_heads))
                    scores = scores - np.float64(slopes[b, head]) * np.abs(distance[b, asked])
                if key_bias is not None:
                    scores = scores + key_bias[b, min(head, key_bias.shape[1] - 1)].astype(np.float64)
                sink = -np.inf if learnable_sink is None else float(np.asarray(learnable_sink, np.float32)[head])
                out[b, place], lse[b, place] = _softmax_sums(scores, attended[b, asked], value, sink)
    return out, lse


def mask_by_definition(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    seqused_k: ArrayLike | None = None,
    prefix: int = 0,
    sink_tokens: int = 0,
) -> tuple[Bools, NDArray[np.int64]]:
    """Which keys each row attends, and the distance p(i) - j of a row to each key of its document: both [B, Nq, Nk].

    `cu_seqlens_q` alone holds for the keys, too.
    """
    left, right = window_size
    attended = np.zeros((batch, queries, keys), bool)
    distances = np.zeros((batch, queries, keys), np.int64)
    edges_q = [0, queries] if cu_seqlens_q is None else np.asarray(cu_seqlens_q).tolist()
    for b in range(batch):
        used = keys if seqused_k is None else int(np.asarray(seqused_k)[b])
        of_keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        edges_k = [0, used] if of_keys is None else np.asarray(of_keys).tolist()
        for (first_row, last_row), (first_key, last_key) in zip(pairwise(edges_q), pairwise(edges_k), strict=True):
            rows_d, keys_d = last_row - first_row, last_key - first_key
            position = np.arange(rows_d)[:, None] + keys_d - rows_d
            key = np.arange(keys_d)[None, :]
            inside = np.ones((rows_d, keys_d), bool)
            if left is not None:
                inside &= key >= position - left
            if right is not None and not causal:
                inside &= key <= position + right
            inside |= key < sink_tokens
            if causal:
                inside &= key <= position
            inside |= key < prefix
            attended[b, first_row:last_row, first_key:last_key] = inside
            distances[b, first_row:last_row, first_key:last_key] = position - key
    return attended, distances


def attention64(
    q: NDArray[np.generic], k: NDArray[np.generic], v: NDArray[np.generic], causal: bool, scale: float
) -> tuple[Array64, Array64]:
    """out [B, Hq, N, D] and lse [B, Hq, N] of q [B, Hq, N, D] and k, v [B, Hkv, N, D]."""
    return attention_by_definition(q, k, v, causal=causal, scale=scale)


def relative_error(found: NDArray[np.generic], expected: Array64) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def _softmax_sums(scores: Array64, attended: Bools, value: Array64, sink: float) -> tuple[Array64, Array64]:
    """The weighted means of the values [keys, Dv], and log-sum-exps, of some rows' scores [rows, keys] and a sink."""
    scores = np.where(attended, scores, -np.inf)
    maximum = np.maximum(scores.max(axis=1, initial=-np.inf), sink)
    shift = np.where(np.isneginf(maximum), 0.0, maximum)
    weights = np.exp(scores - shift[:, None])
    total = weights.sum(axis=1) + np.exp(sink - shift)
    if np.isfinite(value).all():
        num = weights @ value
    else:  # a NaN or Inf stays out of the rows that do not attend it
        num = np.stack([row[of_row] @ value[of_row] for row, of_row in zip(weights, attended, strict=True)])
    return num / np.where(total == 0, 1.0, total)[:, None], shift + np.log(total)
