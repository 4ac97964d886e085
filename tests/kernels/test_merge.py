"""Partials: the state, its exact recombination and the division at the end."""

import math

import numpy as np
import pytest
import torch
from exact import DTYPES, TOLERANCE, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from oocattn.kernels.merging import enter, finalise, merge
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask


def partial_of(scores, value):
    """The state of rows with the scores [g, n, m] over value [m, D], by the definition, in float64."""
    maximum = np.max(scores, -1, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isinf(maximum), 0, maximum)[..., None])
    tensors = (weights @ value, weights.sum(-1), maximum)
    keys = torch.full((scores.shape[1],), scores.shape[2], dtype=torch.int64)
    return AttentionState(*(torch.from_numpy(array).float() for array in tensors), keys, 10 * keys)


def finished(state, dtype=torch.float32):
    out = torch.full(state.num.shape, math.nan, dtype=dtype)
    lse = torch.full(state.den.shape, math.nan)
    finalise(state, out, lse)
    return out, lse


def softmax_product(scores, value):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ value / weights.sum(-1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    group_size=st.integers(1, 3),
    rows=st.integers(1, 50),
    head_dim=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    magnitude=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_merging_partials_of_any_split_is_the_whole(group_size, rows, head_dim, sizes, magnitude, seed):
    sizes = [*sizes, 1]  # some key there must be
    random = np.random.default_rng(seed)
    scores = (magnitude * random.standard_normal((group_size, rows, sum(sizes)))).astype(np.float32).astype(float)
    value = random.standard_normal((sum(sizes), head_dim))
    state = AttentionState.empty(group_size, rows, head_dim)
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        span = slice(stop - size, stop)
        merge(state, partial_of(scores[..., span], value[span]))
    out, lse = finished(state)
    expected_lse = scores.max(-1) + np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1))
    assert relative_error(out, softmax_product(scores, value)) <= 1e-6
    assert np.abs(lse.numpy() - expected_lse).max() <= 2e-7 * max(magnitude * 5, 10)
    assert state.keys.tolist() == [sum(sizes)] * rows
    assert state.key_sum.tolist() == [10 * sum(sizes)] * rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_finalise_rounds_once_to_each_dtype_and_overwrites_poison(dtype):
    random = np.random.default_rng(0)
    scores, value = random.standard_normal((2, 5000, 9)), random.standard_normal((9, 64))
    out, lse = finished(partial_of(scores, value), dtype)
    assert relative_error(out, softmax_product(scores, value)) <= TOLERANCE[dtype]
    assert lse.isfinite().all()


def test_many_merges_do_not_add_up_errors():
    random = np.random.default_rng(0)
    scores, value = random.standard_normal((1, 200, 256 * 16)), random.standard_normal((256 * 16, 8)) + 1
    state = AttentionState.empty(1, 200, 8)
    for first in range(0, 256 * 16, 16):
        merge(state, partial_of(scores[..., first : first + 16], value[first : first + 16]))
    assert relative_error(finished(state)[0], softmax_product(scores, value)) <= 1e-6


def test_rows_without_keys_contribute_nothing_and_finish_as_zero():
    full = partial_of(np.random.default_rng(0).standard_normal((1, 4, 3)), np.ones((3, 2)))
    for into, other in ((full, AttentionState.empty(1, 4, 2)), (AttentionState.empty(1, 4, 2), full)):
        expected = full.num.clone()
        merge(into, other)
        assert torch.equal(into.num, expected)
    nothing = AttentionState.empty(1, 4, 2)
    merge(nothing, AttentionState.empty(1, 4, 2))
    out, lse = finished(nothing)
    assert out.abs().sum() == 0
    assert (lse == -math.inf).all()
    assert (nothing.max == -math.inf).all()
    assert nothing.den.abs().sum() == 0


def test_nan_stays_in_its_row():
    state, spoilt = (partial_of(np.zeros((1, 4, 3)), np.ones((3, 2))) for _ in range(2))
    spoilt.max[0, 1] = math.nan
    spoilt.num[0, 2, 0] = math.nan
    merge(state, spoilt)
    out, lse = finished(state)
    assert out.isnan().tolist() == [[[False, False], [True, True], [True, False], [False, False]]]
    assert lse.isnan().tolist() == [[False, True, False, False]]


def test_merge_works_in_place_through_views_and_leaves_the_other_as_it_is():
    random = np.random.default_rng(0)
    state, other = (partial_of(random.standard_normal((2, 10, 3)), random.standard_normal((3, 4))) for _ in range(2))
    before = [tensor.clone() for tensor in (other.num, other.den, other.max, other.keys, other.key_sum)]
    outside = state.num[:, :3].clone()
    merge(state.rows(3, 7), other.rows(3, 7))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (other.num, other.den, other.max, other.keys, other.key_sum), strict=True)
    )
    assert torch.equal(state.num[:, :3], outside)
    assert state.keys.tolist() == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]


def test_bits_do_not_depend_on_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            random = np.random.default_rng(0)
            a, b = (partial_of(random.standard_normal((1, 40_000, 2)), np.ones((2, 3))) for _ in range(2))
            merge(a, b)
            results.append((*finished(a), a.num))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


MASKS = (
    Mask.of(5000, 3000),
    Mask.of(5000, 4000, causal=True, left=50, sinks=3),
    Mask.of(40, 60, left=5, right=2, prefix=9, sinks=11),
    Mask(np.array([0, 3, 3, 7, 50]), np.array([0, 0, 5, 11, 200]), causal=True, left=20, sinks=2),
)


def ledger_of(mask, rows, keys):
    """The number of `keys` that each row attends, and the sum of their indices, key by key."""
    key = np.arange(keys.start, keys.stop)
    numbers = []
    for a, b, c, d in mask.bounds(rows, keys).values():
        attended = key[((a <= key) & (key < b)) | ((c <= key) & (key < d))]
        numbers.append((len(attended), int(attended.sum())))
    return np.array(numbers).T


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_entered_keys_are_those_of_the_mask(mask, device):
    """The numbers and index sums of a part of the keys, twice, and of some that all rows attend."""
    rows, keys = range(1, mask.queries - 2), range(2, mask.keys - 1)
    state = AttentionState.empty(1, len(rows), 8, device)
    bounds = mask.bounds(rows, keys).moved(rows.start, 0)
    enter(state, bounds, keys=5, key_sum=(1 << 64) - 7)
    enter(state, bounds)
    enter(state, None, keys=1, key_sum=2)
    expected, expected_sum = ledger_of(mask, rows, keys)
    assert state.keys.tolist() == (2 * expected + 6).tolist()
    assert state.key_sum.tolist() == (2 * expected_sum - 5).tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_number_of_documents_is_entered(device):
    edges = np.arange(0, 3003, 3)
    mask = Mask(edges, edges, causal=True)
    state = AttentionState.empty(1, mask.queries, 8, device)
    enter(state, mask.bounds(range(mask.queries)))
    assert state.keys.tolist() == [1, 2, 3] * 1000
    assert state.key_sum.tolist() == ledger_of(mask, range(mask.queries), range(mask.keys))[1].tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("heads", [2, 513])
def test_a_learnable_sink_is_one_logit_more_without_a_value(heads, device):
    random = np.random.default_rng(0)
    scores, value = random.standard_normal((heads, 7, 9)), random.standard_normal((9, 5))
    state = partial_of(scores, value)
    fields = [tensor.to(device) for tensor in (state.num, state.den, state.max, state.keys, state.key_sum)]
    fields[0][:, 3], fields[1][:, 3], fields[2][:, 3] = 0, 0, -math.inf  # a row without a key
    state = AttentionState(*fields)
    sinks = random.uniform(-40, 40, heads).tolist()
    out, lse = torch.empty(heads, 7, 5, device=device), torch.empty(heads, 7, device=device)
    before = state.num.clone()
    finalise(state, out, lse, sinks)
    extended = np.concatenate([scores, np.broadcast_to(np.array(sinks)[:, None, None], (heads, 7, 1))], -1)
    extended[:, 3, :-1] = -np.inf
    weights = np.exp(extended - extended.max(-1, keepdims=True))
    expected = (weights[..., :-1] @ value) / weights.sum(-1, keepdims=True)
    assert np.abs(out.cpu().numpy() - expected).max() <= 2e-6
    assert np.abs(lse.cpu().numpy() - (extended.max(-1) + np.log(weights.sum(-1)))).max() <= 4e-6
    assert torch.equal(state.num, before)
    assert not out[:, 3].any()


def test_misfits_are_refused():
    state = AttentionState.empty(2, 6, 8)
    with pytest.raises(ValueError, match="2 sinks"):
        finalise(AttentionState.empty(1, 6, 8), torch.empty(1, 6, 8), torch.empty(1, 6), [0.0, 0.0])
    with pytest.raises(ValueError, match="bounds of rows 0 to 5: expected 0 to 6"):
        enter(state, Mask.of(5, 5).bounds(range(5)))
    with pytest.raises(ValueError, match="cannot merge"):
        merge(state, AttentionState.empty(2, 1, 8))
    with pytest.raises(ValueError, match="cannot write"):
        finalise(state, torch.empty(2, 1, 8), torch.empty(2, 6))
    with pytest.raises(ValueError, match="expected den and max"):
        AttentionState(state.num, state.den[:1], state.max, state.keys, state.key_sum)


def test_reset_and_nbytes():
    state = partial_of(np.zeros((2, 5, 3)), np.ones((3, 7)))
    tensors = (state.num, state.den, state.max, state.keys, state.key_sum)
    assert AttentionState.nbytes_for(2, 5, 7) == sum(tensor.nbytes for tensor in tensors)
    state.reset()
    fresh = AttentionState.empty(2, 5, 7)
    assert torch.equal(state.num, fresh.num)
    assert torch.equal(state.max, fresh.max)
    assert state.keys.sum() == state.key_sum.sum() == 0


def peak_of_torch(work):
    """Bytes that torch had allocated at most during `work`, by its profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([0, *changes]))


@pytest.mark.parametrize("shape", [(1, 100_000, 64), (8, 20_000, 8), (1, 300_000, 1)])
def test_temporaries_are_bounded_by_a_mebibyte(shape):
    a, b = AttentionState.empty(*shape), AttentionState.empty(*shape)
    out, lse = torch.empty(shape), torch.empty(shape[:2])
    assert 1 << 18 < peak_of_torch(lambda: merge(a, b)) <= 1 << 20
    assert 1 << 18 < peak_of_torch(lambda: finalise(a, out, lse)) <= 1 << 20
