"""What the kernels around library calls do themselves; the definition of attention plays the libraries, on the CPU."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from calling import call
from exact import attention, operands, relative_error
from hypothesis import given
from hypothesis import strategies as st

from oocattn.kernels.cuda.device import allocated_bytes
from oocattn.kernels.libraries import fa3 as fa3_module
from oocattn.kernels.libraries import library as library_module
from oocattn.kernels.merging import finalise, fold
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.kernels.tiles import level_step, make_tiles
from oocattn.problem.calls import CallSize

MIB = 1 << 20


@given(st.integers(0, 60), st.integers(0, 60), st.tuples(*[st.integers(1, 70)] * 2), st.integers(-70, 70))
def test_tiles_cover_each_pair_once_and_are_bounded(rows, keys, steps, upper):
    seen = np.zeros((rows, keys), int)
    for tile in make_tiles(rows, keys, *steps, upper=upper):
        shape = (tile.last_row - tile.first_row, tile.last_key - tile.first_key)
        assert 0 < shape[0] <= (steps[1] if tile.triangular else steps[0])
        assert 0 < shape[1] <= steps[1]
        assert shape[0] == shape[1] or not tile.triangular
        pairs = np.tri(*shape, dtype=int) if tile.triangular else 1
        seen[tile.first_row : tile.last_row, tile.first_key : tile.last_key] += pairs
    reach = np.arange(rows)[:, None] + upper if upper < keys else np.full((rows, 1), keys)
    assert (seen == (np.arange(keys) < reach)).all()


@given(total=st.integers(0, 10**7))
def test_a_level_step_leaves_no_thin_piece(total):
    step = level_step(total, 65_536)
    assert 1 <= step <= 65_536
    if total:
        assert -(-total // step) == -(-total // 65_536)
    if total > 65_536:
        assert total - (-(-total // step) - 1) * step > 20_000


def softmax_call(query, key, value, scale, causal):
    """What every library computes, from [1, g, n, D] and [1, g, m, D] to out [1, g, n, D] and lse [1, g, n]."""
    assert query.shape[:2] == key.shape[:2] == value.shape[:2]
    scores = scale * query.double() @ key.double().mT
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ value.double()).to(query.dtype), scores.logsumexp(-1).float()


def cudnn(query, key, value, bias, want_lse, dropout, causal, debug, *, scale):
    assert (bias, want_lse, dropout, debug) == (None, True, 0.0, False)
    assert key.shape[2] > 1, "cuDNN refuses a single key"
    out, lse = softmax_call(query, key, value, scale, causal)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.unsqueeze(-1), None, None


def flash(query, key, value, dropout, causal, debug, *, scale):
    assert (dropout, debug) == (0.0, False)
    return *softmax_call(query, key, value, scale, causal), None


def fa3(query, key, value, *, softmax_scale, causal, return_attn_probs):
    assert return_attn_probs
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # from [1, n, g, D]
    assert key.shape[1] == value.shape[1] == 1
    shared = (tensor.expand(1, query.shape[1], *tensor.shape[2:]) for tensor in (key, value))
    out, lse = softmax_call(query, *shared, softmax_scale, causal)
    return out.transpose(1, 2), lse


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    monkeypatch.setattr(fa3_module, "library_call", lambda: fa3)


@pytest.mark.parametrize("name", ["cudnn", "flash", "fa3"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("group_size", "rows", "keys"), [(1, 1, 1), (3, 40, 1), (2, 1, 70), (3, 300, 200), (1, 513, 1025), (2, 700, 700)]
)
def test_operands_are_laid_out_cut_and_folded(monkeypatch, name, group_size, rows, keys, causal):
    monkeypatch.setattr(library_module, "MAX_KEYS", 256)
    query, key, value = operands(group_size, rows, rows if causal else keys, 8)
    whole = AttentionState.empty(group_size, rows + 7, 8)
    state = whole.rows(3, rows + 3)
    half = len(key) // 2  # a state goes on over calls
    for span in [slice(None)] if causal else [slice(0, half), slice(half, None)]:
        call(get_kernel(name), query, key[span], value[span], state, scale=0.3, causal=causal)
    out, lse = torch.full_like(query, math.nan), torch.full_like(state.den, math.nan)
    finalise(state, out, lse)
    expected_out, expected_lse = attention(query, key, value, 0.3, causal)
    assert relative_error(out, expected_out) <= 1e-6
    assert np.abs(lse.numpy() - expected_lse).max() <= 2e-6
    assert whole.den[:, :3].sum() == whole.den[:, -4:].sum() == 0


def test_fold_refuses_misfits():
    state = AttentionState.empty(2, 6, 8)
    for out, lse in ((torch.zeros(2, 1, 8), torch.zeros(2, 6)), (torch.zeros(2, 6, 8), torch.zeros(2, 1))):
        with pytest.raises(ValueError, match="cannot fold"):
            fold(state, out, lse)
    assert state.den.sum() == 0


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), 0),
        ((1, 1), 2 * MIB),
        ((MIB, MIB, 1), 4 * MIB),
        ((MIB + 1,), 20 * MIB),
        ((9 * MIB, 9 * MIB, 100), 22 * MIB),
        ((9 * MIB,) * 3, 40 * MIB),
        ((2 * MIB,) * 9, 20 * MIB),
        ((10 * MIB, 33 * MIB - 1), 44 * MIB),
    ],
)
def test_sizes_are_rounded_as_the_caching_allocator_does(sizes, expected):
    assert allocated_bytes(*sizes) == expected


@pytest.mark.parametrize("name", ["cudnn", "flash", "fa3"])
def test_scratch_holds_the_results_and_little_more(name):
    bound = get_kernel(name).scratch_bytes
    for group_size, rows, head_dim in ((1, 65_536, 128), (4, 32_768, 64), (8, 16_384, 128)):
        results = group_size * rows * (head_dim * 2 + 4)
        size = CallSize(group_size, rows, 65_536, head_dim, head_dim, "bfloat16")
        assert 2 * results < bound(size) <= 2.1 * results + 4 * MIB
        assert bound(replace(size, masked=True)) >= get_kernel("torch").scratch_bytes(replace(size, masked=True))
    size = CallSize(1, 65_536, 65_536, 128, 128, "float16")
    assert bound(replace(size, keys=10**9)) <= 2 * bound(size)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "dim"), [("hopper", 128), ("hopper", 256), ("hopper-precise", 128)])
def test_scratch_of_the_hopper_kernel_does_not_grow_with_the_keys(name, dim, plain, masked):
    bound = get_kernel(name).scratch_bytes
    size = CallSize(8, 65_536, 1 << 20, dim, dim, "float16", plain=plain, masked=masked)
    assert bound(replace(size, keys=1 << 30)) == bound(size) <= 80 * MIB


@pytest.mark.parametrize("keys", [65_536, 1 << 18])
def test_scratch_of_the_hopper_kernel_for_float32_holds_both_parts_of_each_number(keys):
    size = CallSize(4, 65_536, keys, 128, 64, "float32")
    parts = 2 * 2 * (4 * 65_536 * 128 + keys * (128 + 64))
    for name in ("hopper", "hopper-precise"):
        assert parts < get_kernel(name).scratch_bytes(size) <= parts + 32 * MIB


@pytest.mark.parametrize("ask", ["nothing", "allow_tf32", "fp32_precision"])
def test_tf32_is_off_within_full_precision_and_as_before_after_it(ask):
    matmul = torch.backends.cuda.matmul
    try:
        if ask != "nothing":
            with contextlib.suppress(AttributeError):  # torch 2.8 has no fp32_precision
                setattr(matmul, ask, True if ask == "allow_tf32" else "tf32")
        before = matmul.fp32_precision
        with full_precision(torch.device("cuda")):
            assert not matmul.allow_tf32
        assert matmul.fp32_precision == before
        assert matmul.allow_tf32 == (ask != "nothing")
    finally:
        matmul.allow_tf32 = False
