"""Reductions of weights on a GPU: against dense float64 on the same device, in corner cases, and bit by bit."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from any_mask import Terms, dense_scores, make_operands, random_intervals, random_mask
from on_gpu import CUDA, kernel_for
from reducing import Arrays, Reducer, all_reductions, check, check_top, survey

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import second_pass_kernel
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import Reduced

pytestmark = pytest.mark.gpu

EVERY_TERM = Terms(softcap=20.0, slopes=True, bias="each")


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    kernel_for("hopper-survey", "float16", 64)


def dense(call: Operands) -> tuple[np.ndarray, torch.Tensor]:
    """The weights [g, n, m] and log-sum-exps [g, n] of a call, in float64."""
    scores = dense_scores(call)
    return scores.softmax(-1).nan_to_num_(0.0).cpu().numpy(), scores.logsumexp(-1)


def check_call(call: Operands, tolerance: float, top: int = 8, **blocks: int) -> Arrays:
    """Compare the reductions of a call, with the log-sum-exp that it has, with the dense weights."""
    weights, lse = dense(call)
    found = survey(call, lse, all_reductions(call.keys, top=top, **blocks))
    rounding = 3e-6 + 3e-7 * float(lse.nan_to_num(neginf=0.0).abs().max())  # of lse and scores in float32
    check(found, weights, tolerance + rounding, least=rounding, **blocks)
    return found


def standard(rows: int, keys: int, heads: int = 1, dtype: str = "float16") -> Operands:
    return make_operands(None, heads, (64, 64), dtype, Terms(), size=(rows, keys))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("terms", [Terms(), EVERY_TERM], ids=["plain", "terms"])
def test_any_mask_and_terms_give_the_reductions_of_the_dense_weights(dtype: str, terms: Terms) -> None:
    rng = random.Random(23)
    for case in range(10):
        dim = rng.choice([64, 64, 40, 128, 256 if dtype != "float32" else 96])
        call = make_operands(random_intervals(rng, random_mask(rng)), rng.choice([1, 3]), (dim, 64), dtype, terms, case)
        row_block, key_block = rng.choice([1, 7, 64, 333]), rng.choice([1, 5, 50, 128, 1000])
        top = rng.choice([1, 8, 8, 40, 128])
        check_call(call, 5e-5, top=top, row_block=row_block, key_block=key_block)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_long_calls_of_several_spans_and_pools(mask: str, dtype: str) -> None:
    call = standard(1100, 40_000, 2, dtype)
    if mask != "full":
        left = 9000 if mask == "window" else None
        of_all = Mask.of(1100, 40_000, causal=True, left=left)
        call = replace(call, intervals=make_intervals(of_all, range(1100), range(40_000)))
    check_call(call, 2e-5, row_block=300, key_block=1000)


@pytest.mark.parametrize("top", [1, 5, 128])
def test_top_keys_of_repeated_keys_are_distinct_and_have_their_weights(top: int) -> None:
    call = standard(300, 400, 2)
    call = replace(call, key=call.key.repeat(50, 1), value=call.value.repeat(50, 1))  # each key is there 50 times
    weights, lse = dense(call)
    check_top(survey(call, lse, [Reduced("top_keys", (top,), 2 * top)]), weights, 2e-5)


def test_of_equal_weights_the_first_keys_are_kept() -> None:
    call = standard(500, 30_000, 2)
    call = replace(call, query=call.query * 0)
    found = survey(call, torch.full((2, 500), math.log(30_000), device=CUDA))
    assert (found["top_keys"] == np.arange(8)).all()
    np.testing.assert_allclose(found["top_weights"], 1 / 30_000, rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], math.log(30_000), rtol=1e-6)
    np.testing.assert_allclose(found["received"], 500 / 30_000, rtol=1e-5)


@pytest.mark.parametrize("top", [8, 100])
def test_weights_that_grow_along_the_keys_are_all_kept_in_their_turn(top: int) -> None:
    rows, keys = 300, 4000
    query = torch.zeros(1, rows, 8, device=CUDA, dtype=torch.float32)
    key = torch.zeros(keys, 8, device=CUDA, dtype=torch.float32)
    query[..., 0], key[:, 0] = 1.0, torch.linspace(-5, 5, keys, device=CUDA)
    call = Operands(query, key, key, Scores(1.0))
    found = survey(call, dense(call)[1], [Reduced("top_keys", (top,), 2 * top)])
    assert (found["top_keys"] == np.arange(keys - 1, keys - 1 - top, -1)).all()


def test_keys_in_several_calls_are_those_of_one_in_any_grouping() -> None:
    call = standard(700, 700, 2)
    key = call.key.clone()
    key[350:] = key[:350]  # some weights are equal
    mask = Mask.of(700, 700, causal=True)
    call = replace(call, key=key, intervals=make_intervals(mask, range(700), range(700)))
    weights, lse = dense(call)
    spans = [range(0, 8), range(8, 96), range(96, 432), range(432, 700)]
    added, one, other = (Reducer(call, lse) for _ in range(3))
    check(added.arrays(added.attend(*spans)), weights, 2e-5)
    merged = one.attend(spans[3])
    for number in (1, 0, 2):
        one.merge(merged, one.attend(spans[number]))
    check(one.arrays(merged), weights, 2e-5)
    pairs = [other.merge(*(other.attend(spans[number]) for number in pair)) for pair in ((0, 1), (2, 3))]
    check(other.arrays(other.merge(*pairs)), weights, 2e-5)


@pytest.mark.parametrize("case", ["full", "documents", "equal weights"])
def test_bits_are_the_same_in_every_call(case: str) -> None:
    call = standard(6000, 20_000, 2)
    if case == "documents":
        edges = np.array([0, 5, 900, 960, 2433, 6000])
        mask = Mask(edges, edges, causal=True)
        call = replace(standard(6000, 6000, 2), intervals=make_intervals(mask, range(6000), range(6000)))
    elif case == "equal weights":
        call = replace(call, query=call.query * 0)
    shift = torch.full((2, 6000), 9.0, device=CUDA)
    asked = all_reductions(call.keys, row_block=77, key_block=90)
    found = [{name: array.tobytes() for name, array in survey(call, shift, asked).items()} for _ in range(6)]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("hidden_by", ["bias", "mask", "shift"])
def test_rows_whose_keys_weigh_nothing_attend_none_and_have_no_entropy(hidden_by: str) -> None:
    call, empty = standard(500, 300, 2), {"bias": 70, "mask": 200, "shift": 33}[hidden_by]
    if hidden_by == "bias":  # of the keys of the first 70 rows
        bias, mask = torch.zeros(1, 300, device=CUDA), Mask.of(300, 300, causal=True)
        bias[:, :70] = -math.inf
        intervals = make_intervals(mask, range(300), range(300))
        call = replace(call, query=call.query[:, :300], intervals=intervals, key_bias=bias)
    elif hidden_by == "mask":  # the first 200 rows attend no key
        call = replace(call, intervals=make_intervals(Mask.of(500, 300, causal=True), range(500), range(300)))
    shift = torch.full(call.query.shape[:2], 8.0, device=CUDA)
    shift[:, :empty] = -math.inf
    reducer = Reducer(call, shift)
    state = reducer.attend(range(300))
    found = reducer.arrays(state)
    assert not found["top_weights"][:, :empty].any()
    assert (found["top_keys"][:, :empty] == -1).all()
    assert not found["entropy"][:, :empty].any()
    assert np.isfinite(found["entropy"]).all()
    assert (found["top_keys"][:, empty:, 0] >= 0).all()
    assert all(np.isfinite(found[name]).all() for name in ("received", "pooled"))
    assert (state.max[:, empty:] == 0).all()
    if hidden_by == "mask":
        assert (state.max[:, :empty] == -math.inf).all()
    if hidden_by == "bias":
        assert not found["received"][:, :70].any()


def test_rows_of_nan_are_alone_in_that() -> None:
    call = standard(600, 900, 2)
    lse, asked = dense(call)[1], all_reductions(900)[1:3]
    clean = survey(call, lse, asked)
    query = call.query.clone()
    query[1, [3, 300, 599], 2] = math.nan
    found = survey(replace(call, query=query), lse, asked)
    damaged = np.zeros((2, 600), bool)
    damaged[1, [3, 300, 599]] = True
    for name in clean:
        assert np.array_equal(found[name][~damaged], clean[name][~damaged]), name
    assert np.isnan(found["entropy"][damaged]).all()
    assert np.isnan(found["top_weights"][damaged]).all()
    assert (found["top_keys"][damaged] == -1).all()


def test_small_sums_keep_their_bits() -> None:
    """As of keys that next to nothing of a row's weight goes to, where another key has it all."""
    call = standard(3000, 4096)
    key = call.key.clone()
    key[0] = 4
    call = replace(call, query=call.query.abs(), key=key)
    weights, lse = dense(call)
    found = survey(call, lse, [Reduced("received")])
    expected = weights.sum(1)
    assert np.median(expected) < 1e-6
    np.testing.assert_allclose(found["received"], expected, rtol=5e-5, atol=1e-17)


def test_each_reduction_by_itself_has_the_bits_of_all() -> None:
    call = standard(1000, 5000, 2)
    shift, asked = dense(call)[1], all_reductions(5000)
    every = survey(call, shift, asked)
    for each in asked:
        for name, array in survey(call, shift, [each]).items():
            assert np.array_equal(array, every[name]), name


def test_strides_and_memory_are_those_of_any_call() -> None:
    call = standard(2000, 3000, 3)
    lse = dense(call)[1]
    expected = survey(call, lse)
    wide = torch.zeros(3, 2000, 100, device=CUDA, dtype=torch.float16)
    wide[..., 9:73] = call.query
    found = survey(replace(call, query=wide[..., 9:73]), lse)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_it_is_chosen_where_it_serves() -> None:
    assert second_pass_kernel("surveys", "cuda", "float16", 64, 60) == "hopper-survey"  # values are not read
    assert second_pass_kernel("surveys", "cuda", "float16", 60, 64) == "weights"
    assert second_pass_kernel("surveys", "cuda", "float32", 256, 64) == "weights"
