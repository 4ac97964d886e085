"""The kernels that run on a CPU against float64, through the public interface. Those for GPUs: `test_cuda`."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from calling import MASKS, attended, call, triangle
from exact import DTYPES, TOLERANCE, attention, operands, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

KERNELS = ("cpu", "reference", "torch")
SAME_BITS = ("cpu",)  # kernels that runs on CPUs choose


def finished(state, dtype=torch.float32):
    """out and lse of a state, written into poisoned buffers."""
    out = torch.full(state.num.shape, math.nan, dtype=dtype)
    lse = torch.full(state.den.shape, math.nan)
    finalise(state, out, lse)
    return out, lse


def attend(name, query, key, value, *, scale=None, causal=False):
    state = AttentionState.empty(*query.shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call(get_kernel(name), query, key, value, state, scale=scale, causal=causal)
    return state


def spans(total, cuts):
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    return list(itertools.pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(KERNELS),
    group_size=st.integers(1, 4),
    rows=st.integers(1, 256),
    keys=st.integers(1, 256),
    head_dim=st.integers(1, 256),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    cuts=st.lists(st.integers(1, 255), max_size=4),
    seed=st.integers(0, 99),
)
def test_any_call_in_any_spans_of_keys_is_attention(name, group_size, rows, keys, head_dim, dtype, causal, cuts, seed):
    query, key, value = operands(group_size, rows, rows if causal else keys, head_dim, dtype, seed)
    scale = head_dim**-0.5
    state = AttentionState.empty(group_size, rows, head_dim)
    kernel = get_kernel(name)
    for first, last in spans(key.shape[0], cuts):
        span = (key[first:last], value[first:last])
        if causal:
            call(kernel, query[:, first:last], *span, state.rows(first, last), scale=scale, causal=True)
            call(kernel, query[:, last:], *span, state.rows(last, rows), scale=scale, causal=False)
        else:
            call(kernel, query, *span, state, scale=scale, causal=False)
    out, lse = finished(state, dtype)
    expected_out, expected_lse = attention(query, key, value, scale, causal)
    assert relative_error(out, expected_out) <= TOLERANCE[dtype]
    assert np.abs(lse.numpy() - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("group_size", "rows", "keys", "head_dim", "causal"),
    [(1, 5000, 8192 + 37, 8, False), (3, 1500, 2500, 16, False), (1, 9000, 9000, 8, True), (2, 1300, 1300, 64, True)],
)
def test_calls_beyond_the_tiles_are_attention(name, group_size, rows, keys, head_dim, causal):
    query, key, value = operands(group_size, rows, keys, head_dim)
    state = attend(name, query, key, value, causal=causal)
    out, lse = finished(state)
    sample = [*range(0, rows, 509), 511, 512, 1023, 1024, rows - 1]
    visible = [row + 1 if causal else keys for row in sample]
    expected = [
        attention(query[:, row : row + 1], key[:count], value[:count], head_dim**-0.5, False)
        for row, count in zip(sample, visible, strict=True)
    ]
    expected_out, expected_lse = (np.concatenate(parts, 1) for parts in zip(*expected, strict=True))
    assert relative_error(out[:, sample], expected_out) <= 2e-6
    assert np.abs(lse[:, sample].numpy() - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_any_intervals_are_attention(name, mask):
    rows, keys = range(100, mask.queries), range(37, mask.keys)
    query, key, value = operands(2, len(rows), len(keys), 24)
    state = AttentionState.empty(*query.shape)
    intervals = make_intervals(mask, rows, keys)
    get_kernel(name).attend(Operands(query, key, value, Scores(0.2), intervals), state)
    out, lse = finished(state)
    hidden = ~attended(intervals, len(keys))
    scores = (0.2 * query.double() @ key.double().T).masked_fill(hidden, -math.inf)
    dead = hidden.all(-1)
    assert relative_error(out, (scores.softmax(-1).nan_to_num(0.0) @ value.double()).numpy()) <= 2e-6
    assert (lse - scores.logsumexp(-1))[:, ~dead].abs().max() <= 1e-5
    assert (lse[:, dead] == -math.inf).all()
    assert not out[:, dead].any()
    assert not state.keys.any(), "a kernel enters nothing in the ledger"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_reach_the_rows_whose_intervals_have_them(name, bad):
    mask = Mask.of(400, 400, left=20, right=5, prefix=30)
    intervals = make_intervals(mask, range(400), range(400))
    query, key, value = operands(2, 400, 400, 8)
    value[[7, 200]] = bad
    state = AttentionState.empty(*query.shape)
    get_kernel(name).attend(Operands(query, key, value, Scores(0.2), intervals), state)
    reached = attended(intervals, 400)[:, [7, 200]].any(-1)
    assert torch.equal(~finished(state)[0].isfinite().all(-1), reached.expand(2, 400))
    assert torch.equal(finished(state)[0].isnan().any(-1), (reached & (bad != bad)).expand(2, 400))


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_inputs_give_a_float32_state(dtype):
    query, key, value = operands(2, 300, 700, 64, dtype)
    out, lse = finished(attend("cpu", query, key, value))
    expected_out, expected_lse = attention(query, key, value, 64**-0.5, False)
    assert relative_error(out, expected_out) <= 2e-6
    assert np.abs(lse.numpy() - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_operands_may_be_slices_of_larger_tensors(name):
    query, key, value = operands(3, 200, 200, 24)
    part = attend(name, query[:, 50:150], key[20:90], value[20:90])
    copy = attend(name, query[:, 50:150].clone(), key[20:90].clone(), value[20:90].clone())
    assert torch.equal(part.num, copy.num)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 31, 33, 64, 200, 600, 800, 1100])
@pytest.mark.parametrize("name", SAME_BITS)
def test_bits_depend_neither_on_threads_nor_on_alignment(name, rows, causal, dtype):
    for group_size, keys, head_dim in ((1, 1, 64), (1, 5, 256), (1, 700, 80), (2, 513, 33), (7, 16, 1), (1, 3000, 64)):
        given_operands = operands(group_size, rows, rows if causal else keys, head_dim, dtype)
        states = []
        before = torch.get_num_threads()
        try:
            for threads, offset in ((1, 0), (2, 0), (2, 3)):
                torch.set_num_threads(threads)
                moved = [torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape) for t in given_operands]
                states.append(attend(name, *moved, causal=causal))
        finally:
            torch.set_num_threads(before)
        for state in states[1:]:
            assert torch.equal(state.num, states[0].num)
            assert torch.equal(state.den, states[0].den)
            assert torch.equal(state.max, states[0].max)


def test_one_kernel_serves_threads_at_once():
    kernel = get_kernel("cpu")
    problems = [operands(1, 600, 900, 32, seed=seed) for seed in range(4)]
    states = [AttentionState.empty(1, 600, 32) for _ in problems]
    work = [
        threading.Thread(target=call, args=(kernel, *problem, state), kwargs={"scale": 0.2})
        for problem, state in zip(problems, states, strict=True)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    for problem, state in zip(problems, states, strict=True):
        assert torch.equal(state.num, attend("cpu", *problem, scale=0.2).num)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_query_or_no_key_has_no_effect(name, causal, rows, keys):
    rows, keys = (0, 0) if causal else (rows, keys)
    state = attend(name, *operands(2, rows, keys, 8), causal=causal)
    assert state.num.abs().sum() == 0
    assert (state.max == -math.inf).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_a_thousand(name, causal):
    query, key, value = operands(1, 300, 300, 16)
    query, key = query.sign() * 7.9, key.sign() * 7.9  # scores are +-1,000 at most, and many are
    out, lse = finished(attend(name, query, key, value, scale=1.0, causal=causal))
    expected_out, expected_lse = attention(query, key, value, 1.0, causal)
    assert lse.abs().max() > 500
    assert relative_error(out, expected_out) <= 1e-4  # a score of 1,000 is known to 6e-5 in float32
    assert np.abs(lse.numpy() - expected_lse).max() <= 1e-3


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1e4, 1e9, 1e15, 1e36])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_of_equal_large_scores_weigh_all_their_keys_alike(name, size, sign):
    """As where padding is masked by a constant: spans of different length count as many keys as they have."""
    query, key, value = operands(2, 70, 100, 72)
    query[..., 0], key[:, 0], key[:, 1:] = 1, sign * size, 0
    state = AttentionState.empty(*query.shape)
    for first, last in spans(100, [3, 50]):
        call(get_kernel(name), query, key[first:last], value[first:last], state, scale=0.3, causal=False)
    out, lse = finished(state)
    assert relative_error(out, value.double().mean(0).expand(out.shape).numpy()) <= 1e-6
    assert (lse - sign * 0.3 * size - math.log(100)).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("constant", [-1e4, -1e9, -1e30, -1e37])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_a_large_constant_masks_weigh_nothing(name, constant, causal):
    query, key, value = operands(2, 90, 90, 72)
    query[..., -1], key[:, -1] = 1, 0
    key[1::2, -1] = constant  # row 0 of a causal call has a key
    state = AttentionState.empty(*query.shape)
    for first, last in spans(90, [] if causal else [1, 2, 40]):
        call(get_kernel(name), query, key[first:last], value[first:last], state, scale=0.1, causal=causal)
    out, lse = finished(state)
    expected_out, expected_lse = attention(query, key, value, 0.1, causal)
    assert relative_error(out, expected_out) <= 2e-6
    assert np.abs(lse.numpy() - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1e7, 1e10, 1e15, 1e30])
@pytest.mark.parametrize("nan", [False, True])
def test_large_scores_leave_each_row_its_best_key_also_beside_a_nan(name, size, nan):
    query, key, value = operands(2, 60, 60, 16)
    query, key = query * math.sqrt(size), key * math.sqrt(size)
    scores = torch.einsum("gnd,md->gnm", query.double(), key.double())
    best, second = scores.topk(2).values.unbind(-1)
    clear = best - second > 1e-5 * size  # float32 scores do not decide the others
    assert clear.sum() > 100
    if nan:
        query[1, 7], clear[1, 7] = math.nan, False
    out, lse = finished(attend(name, query, key, value, scale=1.0))
    assert relative_error(out[clear], value[scores.argmax(-1)][clear].double().numpy()) <= 2e-6
    assert (lse - best)[clear].abs().max() <= 1e-5 * size
    assert out.isnan().any(-1).sum() == nan


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_inf_reach_the_rows_that_attend_them_and_no_others(name, bad, where):
    query, key, value = operands(2, 90, 90, 8)
    clean, _ = finished(attend("reference", query, key, value, causal=True))
    spoilt = {"query": query[1, 40], "key": key[40], "value": value[40]}[where]
    spoilt[:] = bad
    state = attend(name, query, key, value, causal=True)
    out, _ = finished(state)
    expected = row_by_row(query, key, value)
    assert torch.equal(out.isnan(), expected.isnan())
    assert not out[:, :40].isnan().any()
    assert (out[:, :40] - clean[:, :40]).abs().max() < 1e-5
    assert not out[1, 40].isfinite().any()


def row_by_row(query, key, value):
    """Causal attention by torch without a mask, so that nothing flows that should not."""
    out = torch.empty_like(query)
    for row in range(query.shape[1]):
        scores = (query[:, row : row + 1].double() @ key[: row + 1].double().T) * query.shape[-1] ** -0.5
        out[:, row] = (scores.softmax(-1) @ value[: row + 1].double())[:, 0].float()
    return out


@pytest.mark.parametrize("name", KERNELS)
def test_scores_of_minus_infinity_weigh_nothing(name):
    query, key, value = operands(1, 40, 30, 4)
    query, key = query.abs() + 1, key.clone()
    key[10:20] = -math.inf
    state = AttentionState.empty(1, 40, 4)
    kernel = get_kernel(name)
    for first in (0, 10, 20):
        span = slice(first, first + 10)
        call(kernel, query, key[span], value[span], state, scale=0.5, causal=False)
    kept = [*range(10), *range(20, 30)]
    out, lse = finished(state)
    expected_out, expected_lse = attention(query, key[kept], value[kept], 0.5, False)
    assert relative_error(out, expected_out) <= 2e-6
    assert np.abs(lse.numpy() - expected_lse).max() <= 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_finite_inputs_whose_scores_overflow_behave_as_minus_infinity(name):
    query, key, value = operands(1, 3, 6, 4)
    query, key = query.abs() + 1, key.clone()
    key[2:] = -3e38
    state = AttentionState.empty(1, 3, 4)
    for first in (0, 2, 4):
        span = slice(first, first + 2)
        call(get_kernel(name), query, key[span], value[span], state, scale=2.0, causal=False)
    out, _ = finished(state)
    assert relative_error(out, attention(query, key[:2], value[:2], 2.0, False)[0]) <= 2e-6


@pytest.mark.parametrize("name", KERNELS)
def test_misfits_are_refused(name):
    query, key, value = operands(2, 6, 5, 8)
    state = AttentionState.empty(2, 6, 8)
    kernel = get_kernel(name)
    for misfit, intervals in (
        ((query, key, value[:4]), None),
        ((query[0], key, value), None),
        ((query, key[:, :7], value), None),
        ((query, key.half(), value), None),
        ((query, key, value), triangle(5)),
        ((query, key, value), triangle(6)),
    ):
        with pytest.raises(ValueError, match=r"expected|fit"):
            Operands(*misfit, Scores(1.0), intervals)
    for terms in ({"slopes": (0.5, 0.5)}, {"key_bias": torch.zeros(3, 5)}, {"key_bias": torch.zeros(1, 5).double()}):
        with pytest.raises(ValueError, match="expected"):
            Operands(query, key, value, Scores(1.0), **terms)
    for other in (state.rows(0, 1), AttentionState.empty(2, 6, 7)):
        with pytest.raises(ValueError, match="expected"):
            kernel.attend(Operands(query, key, value, Scores(1.0)), other)
    assert state.den.sum() == 0
