"""Calls of the GPU kernels, and the comparison of what they leave with float64 on the same device."""

import math

import pytest
import torch

from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel, rounds_weights
from oocattn.kernels.state import AttentionState

CUDA = torch.device("cuda")
BOUND = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 2e-6}  # relative error of the output, before it is rounded
PRECISE_BOUND = {"float16": 2e-6, "bfloat16": 5e-6, "float32": 2e-6}  # the same of kernels that round no weights


def bound_of(name, dtype):
    return (BOUND if rounds_weights(name) else PRECISE_BOUND)[dtype]


def kernel_for(name, dtype, head_dim, value_dim=None):
    kernel = get_kernel(name)
    reason = kernel.unsupported_reason(CUDA, dtype, head_dim, value_dim or head_dim)
    if reason:
        pytest.skip(reason)
    return kernel


def operands(group_size, rows, keys, head_dim, dtype, seed=0, *, value_dim=None):
    """Standard normal query [g, n, D], key [m, D] and value [m, Dv] on the device; Dv is D where it is not given."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    shapes = ((group_size, rows, head_dim), (keys, head_dim), (keys, value_dim or head_dim))
    return [torch.randn(shape, device=CUDA, generator=generator).to(getattr(torch, dtype)) for shape in shapes]


def poisoned_state(*shape):
    """An empty state whose memory held NaN before."""
    state = AttentionState.empty(*shape, CUDA)
    for tensor in (state.num, state.den, state.max):
        tensor.fill_(math.nan)
    state.reset()
    return state


def finished(state):
    out, lse = torch.full_like(state.num, math.nan), torch.full_like(state.den, math.nan)
    finalise(state, out, lse)
    return out, lse


def exact(query, key, value, scale, rows, causal, block=1 << 14):
    """out [g, rows, Dv] and lse [g, rows] of some rows in float64, over blocks of keys."""
    query = query[:, rows].double()
    maximum = torch.full(query.shape[:2], -math.inf, dtype=torch.float64, device=CUDA)
    den, num = torch.zeros_like(maximum), query.new_zeros(*maximum.shape, value.shape[-1])
    for first in range(0, len(key), block):
        scores = scale * query @ key[first : first + block].double().T
        if causal:
            position = torch.arange(first, first + scores.shape[-1], device=CUDA)
            scores.masked_fill_(position > rows[:, None], -math.inf)
        higher = torch.maximum(maximum, scores.amax(-1))
        kept, weights = torch.exp(maximum - higher), torch.exp(scores - higher.unsqueeze(-1))
        den = den * kept + weights.sum(-1)
        num = num * kept.unsqueeze(-1) + weights @ value[first : first + block].double()
        maximum = higher
    return num / den.unsqueeze(-1), maximum + torch.log(den)


def check(state, query, key, value, scale, causal, bound, *, rows=None, lse_error=1e-5):
    """Compare a state with float64, on sampled rows: `bound` is of the output's relative error."""
    count = query.shape[1]
    if rows is None:
        edges = [0, 1, 2, count // 2 - 1, count // 2, count - 2, count - 1]
        chance = torch.randint(count, (48,), generator=torch.Generator().manual_seed(1)).tolist()
        rows = torch.tensor(sorted({row for row in (*edges, *chance) if 0 <= row < count}), device=CUDA)
    out, lse = finished(state)
    expected_out, expected_lse = exact(query, key, value, scale, rows, causal)
    error = float((out[:, rows].double() - expected_out).norm() / expected_out.norm())
    assert error <= bound
    assert float((lse[:, rows].double() - expected_lse).abs().max()) <= lse_error
    assert not state.keys.any()  # a kernel enters nothing in the ledger
    assert not state.key_sum.any()
