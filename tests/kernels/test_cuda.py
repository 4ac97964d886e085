"""The kernels for GPUs against float64 on the same device, and merging there against the torch operations."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from calling import MASKS, attended, call
from on_gpu import BOUND, CUDA, bound_of, check, finished, kernel_for, operands, poisoned_state

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import enter, finalise, fold, merge
from oocattn.kernels.registry import device_type, get_kernel, kernel_names
from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

pytestmark = pytest.mark.gpu

KERNELS = [name for name in kernel_names() if device_type(name) == "cuda"]
every_kernel = pytest.mark.parametrize("name", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", BOUND)
MIB = 1 << 20


@every_kernel
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "group_size", "head_dim", "causal"),
    [
        (65_537, 1, 64, False),
        (65_537, 8, 64, True),
        (65_537, 3, 128, True),
        (65_537, 1, 256, False),
        (100_003, 1, 32, True),
        (100_003, 1, 96, False),
        (100_003, 1, 256, True),
    ],
)
def test_long_calls_are_attention(name, dtype, tokens, group_size, head_dim, causal):
    kernel = kernel_for(name, dtype, head_dim)
    query, key, value = operands(group_size, tokens, tokens, head_dim, dtype, seed=tokens + head_dim)
    state = poisoned_state(group_size, tokens, head_dim)
    scale = head_dim**-0.5
    call(kernel, query, key, value, state, scale=scale, causal=causal)
    check(state, query, key, value, scale, causal, bound_of(name, dtype))


@every_kernel
@every_dtype
def test_a_state_goes_on_over_calls_through_views_and_on_another_stream(name, dtype):
    """Causal attention over three chunks, as a lane does it: each chunk's rows see the chunks before it, then themselves."""
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(3, 9001, 9001, 64, dtype)
    whole = poisoned_state(3, 10_000, 64)
    whole.num[:, 9500:].fill_(math.nan)
    state = whole.rows(499, 9500)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for first, last in ((0, 2999), (2999, 6001), (6001, 9001)):
            span, rows = (key[first:last], value[first:last]), state.rows(first, last)
            call(kernel, query[:, first:last], *span, rows, scale=0.125, causal=True)
            call(kernel, query[:, last:], *span, state.rows(last, 9001), scale=0.125, causal=False)
    stream.synchronize()
    check(state, query, key, value, 0.125, True, bound_of(name, dtype))
    assert whole.num[:, 9500:].isnan().all()
    assert (whole.max[:, :499] == -math.inf).all()


@every_kernel
@every_dtype
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_any_intervals_are_attention(name, dtype, mask):
    kernel = kernel_for(name, dtype, 64)
    rows, keys = range(100, mask.queries), range(37, mask.keys)
    query, key, value = operands(3, len(rows), len(keys), 64, dtype)
    state = poisoned_state(3, len(rows), 64)
    intervals = make_intervals(mask, rows, keys)
    kernel.attend(Operands(query, key, value, Scores(0.125), intervals), state)
    out, lse = finished(state)
    hidden = ~attended(intervals, len(keys)).to(CUDA)
    scores = (0.125 * query.double() @ key.double().T).masked_fill(hidden, -math.inf)
    dead = hidden.all(-1)
    expected = scores.softmax(-1).nan_to_num(0.0) @ value.double()
    assert (out - expected).norm() <= bound_of(name, dtype) * expected.norm()
    assert (lse - scores.logsumexp(-1))[:, ~dead].abs().max() <= 1e-5
    assert (lse[:, dead] == -math.inf).all()
    assert not out[:, dead].any()


@every_kernel
@every_dtype
@pytest.mark.parametrize(("rows", "keys", "causal"), [(1, 1, True), (300, 1, False), (1, 777, False), (2, 2, True)])
def test_single_rows_and_keys(name, dtype, rows, keys, causal):
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(3, rows, keys, 64, dtype)
    state = poisoned_state(3, rows, 64)
    call(kernel, query, key, value, state, scale=0.125, causal=causal)
    check(state, query, key, value, 0.125, causal, bound_of(name, dtype), rows=torch.arange(rows, device=CUDA))


@every_kernel
@every_dtype
@pytest.mark.parametrize(
    ("where", "bad"), [("query", math.nan), ("key", math.nan), ("value", math.nan), ("value", math.inf)]
)
def test_nan_and_inf_reach_the_rows_that_attend_them_and_none_far_before(name, dtype, where, bad):
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(2, 1500, 1500, 64, dtype)
    clean, spoilt = poisoned_state(2, 1500, 64), poisoned_state(2, 1500, 64)
    call(kernel, query, key, value, clean, scale=0.125, causal=True)
    {"query": query[1, 1000], "key": key[1000], "value": value[1000]}[where].fill_(bad)
    call(kernel, query, key, value, spoilt, scale=0.125, causal=True)
    out, expected = finished(spoilt)[0], finished(clean)[0]
    reached = out[1, 1000:1001] if where == "query" else out[:, 1000:]
    assert not reached.isfinite().any()
    reach = 0 if name == "torch" or where == "query" else 512
    assert (out[:, : 1000 - reach] - expected[:, : 1000 - reach]).abs().max() <= 1e-6


def test_plain_torch_keeps_float32_where_tf32_is_allowed():
    query, key, value = operands(1, 2000, 2000, 64, "float32")
    state = poisoned_state(1, 2000, 64)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        call(get_kernel("torch"), query, key, value, state, scale=0.125, causal=False)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    check(state, query, key, value, 0.125, False, BOUND["float32"])


@every_kernel
@every_dtype
def test_nothing_waits_for_the_device(name, dtype):
    kernel = kernel_for(name, dtype, 64)
    query, key, value = operands(2, 5000, 5000, 64, dtype)
    state, other = poisoned_state(2, 5000, 64), poisoned_state(2, 5000, 64)
    out, lse = torch.empty_like(query), torch.empty_like(state.den)

    mask = Mask(np.array([0, 100, 3000, 5000]), np.array([0, 100, 3000, 5000]), causal=True, left=70)

    def everything():
        for causal in (False, True):
            call(kernel, query, key, value, state, scale=0.125, causal=causal)
        call(kernel, query[:, :20], key, value, state.rows(0, 20), scale=0.125, causal=False)
        documents = make_intervals(mask, range(5000), range(5000))
        kernel.attend(Operands(query, key, value, Scores(0.125), documents), state)
        enter(state, mask.bounds(range(5000)))
        merge(other, state)
        finalise(other, out, lse)

    everything()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kernel
@every_dtype
@pytest.mark.parametrize(
    ("group_size", "rows", "keys", "head_dim", "causal"),
    [
        (1, 16_384, 65_536, 64, False),
        (8, 32_768, 32_768, 128, True),
        (3, 70_000, 9000, 256, False),
    ],
)
def test_scratch_is_within_its_bound_and_the_bound_is_not_idle(name, dtype, group_size, rows, keys, head_dim, causal):
    kernel = kernel_for(name, dtype, head_dim)
    call(kernel, *operands(1, 64, 64, head_dim, dtype), poisoned_state(1, 64, head_dim), scale=0.1, causal=causal)
    arguments = (*operands(group_size, rows, keys, head_dim, dtype), poisoned_state(group_size, rows, head_dim))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    call(kernel, *arguments, scale=0.1, causal=causal)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_reserved() - before
    needed = torch.cuda.max_memory_allocated() - used
    bound = kernel.scratch_bytes(CallSize(group_size, rows, keys, head_dim, head_dim, dtype))
    assert max(grown, needed) <= bound
    if group_size * rows > 30_000:  # below, FlashAttention-2 may or may not split the keys
        # The results of two calls; cuBLAS's workspace, and free parts of segments.
        slack, idle = (1.5, 56 * MIB) if name == "torch" else (2.1, 24 * MIB)
        assert bound <= slack * max(grown, needed) + idle


def random_state(group_size, rows, head_dim, generator):
    """A state with rows of every kind: ordinary ones, without keys, with NaN, with an infinite maximum."""
    state = AttentionState(
        torch.randn(group_size, rows, head_dim, generator=generator),
        torch.rand(group_size, rows, generator=generator) + 0.1,
        20 * torch.randn(group_size, rows, generator=generator),
        torch.randint(1000, (rows,), generator=generator),
        torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator),
    )
    kinds = torch.randint(12, (group_size, rows), generator=generator)
    state.num[kinds < 2] = 0
    state.den[kinds < 2] = 0
    state.max[kinds < 2] = -math.inf
    state.max[kinds == 2] = math.nan
    state.max[kinds == 3] = math.inf
    state.num[..., 0][kinds == 4] = math.nan
    return state


def on_device(state, padding):
    """A copy on the device, as a view into a larger state that is filled with 7; and that state."""
    group_size, rows, head_dim = state.num.shape
    whole = AttentionState.empty(group_size, rows + 2 * padding, head_dim, CUDA)
    view = whole.rows(padding, padding + rows)
    for tensor, inner, source in zip(fields(whole), fields(view), fields(state), strict=True):
        tensor.fill_(7)
        inner.copy_(source)
    return view, whole


def fields(state):
    return state.num, state.den, state.max, state.keys, state.key_sum


def assert_same(view, whole, expected):
    for found, wanted in zip(fields(view), fields(expected), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    rows = view.num.shape[1]
    padding = (whole.num.shape[1] - rows) // 2
    for tensor in (whole.num, whole.den, whole.max):
        assert (tensor[:, :padding] == 7).all()
        assert (tensor[:, padding + rows :] == 7).all()
    for tensor in (whole.keys, whole.key_sum):
        assert (tensor[:padding] == 7).all()
        assert (tensor[padding + rows :] == 7).all()


SHAPES = [(1, 1, 1), (1, 1000, 64), (3, 63, 40), (2, 777, 96), (8, 130, 256), (1, 5, 128), (3, 0, 8)]


@pytest.fixture(params=["fused", "torch operations"])
def way(request, monkeypatch):
    """Merging with our own launches, and as where they cannot be compiled."""
    module = import_module("oocattn.kernels.merging")
    if request.param == "fused":
        assert module._load_fused() is not None, "merging does not compile here"
    else:
        monkeypatch.setattr(module, "_load_fused", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
def test_merging_is_as_on_the_cpu(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    into, other = (random_state(*shape, generator) for _ in range(2))
    (view, whole), (other_view, _) = on_device(into, 3), on_device(other, 5)
    merge(view, other_view)
    merge(into, other)
    assert_same(view, whole, into)
    torch.testing.assert_close(other_view.num.cpu(), other.num, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
def test_folding_is_merging_a_divided_result_of_any_strides(shape, dtype):
    group_size, rows, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    state, result = (random_state(*shape, generator) for _ in range(2))
    view, whole = on_device(state, 3)
    out = result.num.to(getattr(torch, dtype))
    by_rows = torch.empty(rows, group_size, head_dim, dtype=out.dtype, device=CUDA).transpose(0, 1)
    lse = torch.empty(group_size, rows, 2, device=CUDA)[..., 1]
    fold(view, by_rows.copy_(out), lse.copy_(result.max))
    merge(state, AttentionState.without_ledger(out.float(), torch.ones(group_size, rows), result.max))
    assert_same(view, whole, state)
