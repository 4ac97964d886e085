"""Scores of extreme sizes, and some that rise, with the kernels for GPUs, against float64 on the same device."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from any_mask import Terms, by_dense_mask, make_operands
from calling import call
from on_gpu import BOUND, bound_of, check, finished, kernel_for, operands, poisoned_state

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import device_type, kernel_names
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

pytestmark = pytest.mark.gpu

every_kernel = pytest.mark.parametrize("name", [name for name in kernel_names() if device_type(name) == "cuda"])
every_dtype = pytest.mark.parametrize("dtype", BOUND)


@every_kernel
@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_a_thousand(name, dtype, causal):
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(1, 1000, 1000, 64, dtype)
    query, key = (4 * tensor[..., :1].sign() * torch.where(tensor > -1.5, 1, -1).to(tensor.dtype) for tensor in (query, key))
    assert (query[0].float() @ key.float().T).abs().max() >= 960
    state = poisoned_state(1, 1000, 64)
    call(kernel, query, key, value, state, scale=1.0, causal=causal)
    bound = max(bound_of(name, dtype), 1e-4)  # a score of 1,000 is known to 6e-5 in float32
    check(state, query, key, value, 1.0, causal, bound, lse_error=1e-3)


our_kernels = pytest.mark.parametrize("name", ["hopper", "hopper-precise", "torch"])


@our_kernels
@every_dtype
@pytest.mark.parametrize("size", [3e4, 1e9, 1e15, 1e36])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_of_equal_large_scores_weigh_all_their_keys_alike(name, dtype, size, sign):
    """As where padding is masked by a constant: spans of different length count as many keys as they have."""
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(2, 700, 1000, 64, dtype)
    key[:] = 0
    query[..., :2], key[:, 0] = 1, sign * min(size, 3e4 if dtype == "float16" else size)
    state = poisoned_state(2, 700, 64)
    for first, last in ((0, 3), (3, 500), (500, 1000)):
        call(kernel, query, key[first:last], value[first:last], state, scale=0.3, causal=False)
    out, lse = finished(state)
    expected = value.double().mean(0).expand(out.shape)
    assert (out - expected).norm() <= bound_of(name, dtype) * expected.norm()
    assert (lse / (0.3 * key[0, 0].float()) - 1).abs().max() <= 1e-3


@our_kernels
@every_dtype
@pytest.mark.parametrize("size", [1e7, 1e10, 1e15, 1e30])
def test_large_scores_leave_each_row_its_best_key(name, dtype, size):
    kernel = kernel_for(name, dtype, 64)
    size = min(size, 1e8) if dtype == "float16" else size
    query, key, value = operands(2, 700, 1000, 64, "float32")
    query, key = ((tensor * math.sqrt(size)).to(getattr(torch, dtype)) for tensor in (query, key))
    value = value.to(query.dtype)
    scores = query.double() @ key.double().T
    best, second = scores.topk(2).values.unbind(-1)
    clear = best - second > 1e-4 * best.abs()
    assert clear.sum() > 1000
    state = poisoned_state(2, 700, 64)
    call(kernel, query, key, value, state, scale=1.0, causal=False)
    out, lse = finished(state)
    assert (out - value[scores.argmax(-1)].float())[clear].abs().max() <= 1e-5
    assert (lse - best)[clear].abs().max() <= 1e-5 * best.max()


@pytest.mark.parametrize("edges", [(0, 600), (0, 200, 400, 600), (0, 300, 600), (200, 600)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype", "dims"),
    [
        ("torch", "float16", (64, 64)),
        ("torch", "float32", (64, 64)),
        ("hopper", "float16", (64, 64)),
        ("hopper", "bfloat16", (128, 128)),
        ("hopper", "bfloat16", (256, 256)),
        ("hopper-precise", "float16", (64, 64)),
        ("hopper-precise", "bfloat16", (128, 128)),
    ],
)
def test_scores_of_minus_infinity_weigh_nothing(name, dtype, dims, edges):
    """Also where a call, or its first steps, have no other scores."""
    kernel = kernel_for(name, dtype, *dims)
    query, key, value = operands(1, 400, 600, dims[0], dtype, value_dim=dims[1])
    query, key = query.abs() + 1, key.clone()
    key[200:400] = -math.inf
    state = poisoned_state(1, 400, dims[1])
    for first, last in pairwise(edges):
        call(kernel, query, key[first:last], value[first:last], state, scale=0.1, causal=False)
    kept = [*range(edges[0], 200), *range(400, 600)]
    check(state, query, key[kept], value[kept], 0.1, False, bound_of(name, dtype))


EDGES = np.array([0, 1000, 1001, 3000, 4000])
RISING = {
    "full": (None, 300, 20_000),
    "few rows": (None, 40, 20_000),
    "causal": (Mask.of(2000, 3000, causal=True), 2000, 3000),
    "window": (Mask.of(3000, 3000, left=700, right=100), 3000, 3000),
    "documents": (Mask(EDGES, EDGES, causal=True), 4000, 4000),
}
"""Masks, rows and keys."""


@pytest.mark.parametrize(("mask", "rows", "keys"), RISING.values(), ids=RISING)
@pytest.mark.parametrize(
    ("name", "dtype", "dims"),
    [
        ("hopper", "float16", (64, 64)),
        ("hopper", "bfloat16", (128, 128)),
        ("hopper", "bfloat16", (256, 256)),
        ("hopper", "float16", (64, 256)),
        ("hopper", "float32", (64, 64)),
        ("hopper", "float32", (128, 128)),
        ("hopper-precise", "float16", (64, 64)),
        ("hopper-precise", "bfloat16", (128, 128)),
    ],
)
def test_scores_that_rise_along_the_keys(name, dtype, dims, mask, rows, keys):
    """Each step of the keys may have scores far above all before: our own kernel then computes these twice."""
    kernel = kernel_for(name, dtype, *dims)
    intervals = None if mask is None else make_intervals(mask, range(rows), range(keys))
    given = make_operands(intervals, 2, dims, dtype, Terms(), size=(rows, keys))
    given.query.mul_(8 / math.sqrt(dims[0])).abs_()  # scores rise by some 130, whatever D is
    given.key.add_(torch.linspace(0, 20, keys, device=given.key.device)[:, None])
    state = poisoned_state(2, rows, dims[1])
    kernel.attend(given, state)
    out, lse = finished(state)
    expected, expected_lse = by_dense_mask(given)
    largest = float(expected_lse.abs().max())
    assert largest > 80
    # Products of such a size are known to some 2^-22 of it.
    assert (out - expected).norm() <= (bound_of(name, dtype) + 3e-7 * largest) * expected.norm()
    assert (lse - expected_lse).abs().max() <= 1e-5 + 1e-6 * largest


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("hopper", "float32"), ("hopper-precise", "bfloat16"), ("hopper-precise", "float32"), ("torch", "float32")],
)
def test_huge_keys_and_values_that_nobody_attends_change_nothing(name, dtype):
    """As of padding that was never written: scales follow from what is attended."""
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(2, 300, 1000, 64, dtype)
    key[600:], value[600:] = 1e30, -1e30
    mask = Mask(np.array([0, 300, 300]), np.array([0, 600, 1000]))
    state = poisoned_state(2, 300, 64)
    intervals = make_intervals(mask, range(300), range(1000))
    kernel.attend(Operands(query, key, value, Scores(0.125), intervals), state)
    check(state, query, key[:600], value[:600], 0.125, False, bound_of(name, dtype))
