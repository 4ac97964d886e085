"""Reductions of weights by the kernel of second passes: against float64, however calls are cut, and in corner cases."""

from __future__ import annotations

import math
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from calling import triangle
from exact import operands
from random_masks import random_call, scores_of
from reducing import Reducer, all_reductions, check, check_top, survey

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions.pooled import Pooled
from oocattn.problem.calls import CallSize
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import Reduced


def shift_of(call: Operands) -> torch.Tensor:
    """The log-sum-exp of a call without slopes."""
    hidden = np.ones((call.rows, call.keys), bool) if call.intervals is None else np.tri(call.rows, call.keys, dtype=bool)
    return scores_of(call, hidden, None).logsumexp(-1)


@pytest.mark.parametrize("seed", range(16))
def test_any_mask_and_terms_give_the_reductions_of_the_dense_weights(seed: int) -> None:
    call, scores, _ = random_call(random.Random(seed), largest=700 if seed % 4 else 1500)
    shift = scores.logsumexp(-1)
    weights = torch.where((scores == -math.inf), 0.0, (scores - shift.nan_to_num(neginf=0.0).unsqueeze(-1)).exp())
    check(survey(call, shift), weights.numpy(), 3e-5)


@pytest.mark.parametrize("top", [1, 5, 128])
def test_top_keys_of_repeated_keys_are_distinct_and_have_their_weights(top: int) -> None:
    query, key, value = operands(2, 300, 400, 16)
    call = Operands(query, key.repeat(5, 1), value.repeat(5, 1), Scores(0.4))  # each key is there 5 times
    shift = shift_of(call)
    weights = (scores_of(call, np.ones((300, 2000), bool), None) - shift.unsqueeze(-1)).exp().numpy()
    check_top(survey(call, shift, [Reduced("top_keys", (top,), 2 * top)]), weights)


def test_uniform_weights_over_thousands_of_keys() -> None:
    rows, keys = 500, 9000
    query, key, value = operands(2, rows, keys, 8)
    found = survey(Operands(query * 0, key, value, Scores(1.0)), torch.full((2, rows), math.log(keys)))
    check(found, np.full((2, rows, keys), 1 / keys))
    np.testing.assert_allclose(found["entropy"], math.log(keys), rtol=1e-6)


def test_weights_that_grow_along_the_keys_are_all_kept_in_their_turn() -> None:
    """The worst order for keeping the largest: every weight is among them when it comes."""
    rows, keys = 300, 4000
    query, key, value = torch.ones(1, rows, 1), torch.linspace(-5, 5, keys)[:, None], torch.zeros(keys, 1)
    call = Operands(query, key, value, Scores(1.0))
    found = survey(call, shift_of(call), [Reduced("top_keys", (8,), 16)])
    assert (found["top_keys"] == np.arange(keys - 1, keys - 9, -1)).all()


def test_of_fewer_keys_than_are_asked_for_the_rest_is_none() -> None:
    call = Operands(*operands(3, 40, 40, 8), Scores(0.3), triangle(40))
    found = survey(call, shift_of(call), [Reduced("top_keys", (100,), 200)])
    of_rows = np.minimum(np.arange(1, 41), 100)
    assert ((found["top_keys"] >= 0).sum(2) == of_rows).all()
    assert ((found["top_weights"] > 0).sum(2) == of_rows).all()
    for row, count in enumerate(of_rows):
        assert (np.sort(found["top_keys"][:, row, :count]) == np.arange(count)).all()
        assert (found["top_keys"][:, row, count:] == -1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("terms", [False, True])
def test_rows_of_nan_are_alone_in_that(bad: float, terms: bool) -> None:
    call = Operands(*operands(2, 600, 900, 8), Scores(0.3, 20.0 if terms else None))
    shift, asked = shift_of(call), all_reductions(900)[1:3]
    clean = survey(call, shift, asked)
    query = call.query.clone()
    query[1, [3, 300, 599], 2] = bad
    found = survey(replace(call, query=query), shift, asked)
    damaged = np.zeros((2, 600), bool)
    damaged[1, [3, 300, 599]] = True
    for name in clean:
        assert np.array_equal(found[name][~damaged], clean[name][~damaged]), name
    if math.isnan(bad):
        assert np.isnan(found["entropy"][damaged]).all()
        assert np.isnan(found["top_weights"][damaged]).all()
        assert (found["top_keys"][damaged] == -1).all()


@pytest.mark.parametrize("hidden_by", ["bias", "mask", "shift"])
def test_rows_whose_keys_weigh_nothing_attend_none_and_have_no_entropy(hidden_by: str) -> None:
    query, key, value = operands(2, 500, 300, 8)
    intervals, bias = None, None
    if hidden_by == "bias":  # of the keys of the first 70 rows
        bias, intervals = torch.zeros(1, 300), triangle(500)
        bias[:, :70] = -math.inf
        call = Operands(query[:, :300], key, value, Scores(0.3), triangle(300), key_bias=bias)
    elif hidden_by == "mask":  # the first 200 rows attend no key
        intervals = make_intervals(Mask.of(500, 300, causal=True), range(500), range(300))
        call = Operands(query, key, value, Scores(0.3), intervals)
    else:
        call = Operands(query, key, value, Scores(0.3))
    shift = torch.full(call.query.shape[:2], 8.0)
    empty = {"bias": 70, "mask": 200, "shift": 33}[hidden_by]
    shift[:, :empty] = -math.inf
    found = survey(call, shift)
    assert not found["top_weights"][:, :empty].any()
    assert (found["top_keys"][:, :empty] == -1).all()
    assert not found["entropy"][:, :empty].any()
    assert np.isfinite(found["entropy"]).all()
    assert (found["top_keys"][:, empty:, 0] >= 0).all()
    assert all(np.isfinite(found[name]).all() for name in ("received", "pooled"))
    if hidden_by == "bias":
        assert not found["received"][:, :70].any()


@pytest.mark.parametrize("causal", [False, True])
def test_keys_in_several_calls_are_those_of_one_in_any_grouping(causal: bool) -> None:
    query, key, value = operands(2, 700, 700, 16)
    call = Operands(query, key.clone(), value, Scores(0.3), triangle(700) if causal else None)
    call.key[350:] = call.key[:350]  # some weights are equal
    shift = shift_of(call)
    hidden = np.tri(700, dtype=bool) if causal else np.ones((700, 700), bool)
    weights = (scores_of(call, hidden, None) - shift.unsqueeze(-1)).exp().numpy()
    spans = [range(0, 1), range(1, 90), range(90, 431), range(431, 700)]
    added = Reducer(call, shift)
    check(added.arrays(added.attend(*spans)), weights)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        one, other = Reducer(call, shift), Reducer(call, shift)
        merged = one.attend(spans[order[0]])
        for number in order[1:]:
            one.merge(merged, one.attend(spans[number]))
        pairs = [other.merge(*(other.attend(spans[number]) for number in pair)) for pair in (order[:2], order[2:])]
        for reducer, state in ((one, merged), (other, other.merge(*pairs))):
            check(reducer.arrays(state), weights)


BIT_CALLS = {
    "weights of many sizes": lambda: Operands(*operands(1, 12_000, 300, 16, torch.float16), Scores(2.0)),
    "causal": lambda: Operands(*operands(4, 1100, 1100, 32), Scores(0.2), triangle(1100)),
    "documents": lambda: Operands(
        *operands(2, 2433, 2433, 24),
        Scores(0.2),
        make_intervals(Mask(*[np.array([0, 5, 900, 960, 2433])] * 2, causal=True), range(2433), range(2433)),
    ),
}


@pytest.mark.parametrize("case", BIT_CALLS)
def test_bits_do_not_depend_on_threads(case: str) -> None:
    call, found, before = BIT_CALLS[case](), [], torch.get_num_threads()
    asked = all_reductions(call.keys, row_block=77, key_block=90)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            arrays = survey(call, torch.full(call.query.shape[:2], 8.0), asked)
            found.append({name: array.tobytes() for name, array in arrays.items()})
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_weights_far_too_large_give_no_warning_of_numpy(recwarn: pytest.WarningsRecorder) -> None:
    """As where the log-sum-exp of a result is wrong, or NaN is in its inputs."""
    call = Operands(*operands(2, 200, 300, 8), Scores(0.3))
    shift = torch.full((2, 200), -88.0)
    shift[:, 50], shift[:, 70] = -math.inf, math.nan
    found = survey(call, shift, all_reductions(300, row_block=7, key_block=7))
    assert np.isinf(found["pooled"]).any()
    assert not [str(each.message) for each in recwarn]


def test_the_pools_of_many_keys_take_what_is_counted() -> None:
    tokens, made = np.arange(1_000_000), Pooled(1024, 977, 0, 1024)
    tracemalloc.start()
    try:
        made.begin(1, range(1024), tokens)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= made.scratch_bytes(CallSize(1, 1024, len(tokens), 64, 64, "float16"), 1024) <= 2 * peak
