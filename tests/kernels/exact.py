"""Attention in float64 numpy, as the definition has it: what the kernels' tests compare with."""

import numpy as np
import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 3e-4, torch.bfloat16: 2e-3, torch.float32: 2e-6}  # relative error of the output


def attention(query, key, value, scale, causal):
    """out [g, n, D] and lse [g, n] of query [g, n, D] over key and value [m, D]; causal: row i attends keys 0..i."""
    q, k, v = (tensor.double().numpy() for tensor in (query, key, value))
    scores = scale * np.einsum("gnd,md->gnm", q, k)
    if causal:
        scores = np.where(np.tri(q.shape[1], k.shape[0], dtype=bool), scores, -np.inf)
    maximum = scores.max(-1, keepdims=True)
    weights = np.exp(scores - maximum)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("gnm,md->gnd", weights / total, v), (maximum + np.log(total))[..., 0]


def relative_error(found, expected):
    return np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)


def operands(group_size, rows, keys, head_dim, dtype=torch.float32, seed=0):
    """Standard normal query [g, n, D], key [m, D] and value [m, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((group_size, rows, head_dim), (keys, head_dim), (keys, head_dim))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
