"""The kernel of second passes against float64: sums of exp(score - shift), and of these times projected values."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from calling import MASKS, attended, triangle
from exact import DTYPES, operands
from random_masks import random_call, scores_of

from oocattn.kernels import projected
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import merge
from oocattn.kernels.registry import device_type, get_kernel, kernel_names
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import VECTORS, sign_vectors

KERNELS = [name for name in kernel_names("proofs") if device_type(name) == "cpu"]
ERROR = 3e-6  # relative, of sums whose scores are a few tens at most


def second_pass(call: Operands, shift: torch.Tensor) -> Operands:
    return replace(call, shift=shift.float(), projection=torch.from_numpy(sign_vectors(1, call.value.shape[1])))


def attend(name: str, *calls: Operands) -> AttentionState:
    """The state of second passes over the same rows, one after the other."""
    state = AttentionState.empty(*calls[0].query.shape[:2], VECTORS)
    for call in calls:
        get_kernel(name).attend(call, state)
    return state


def check(state: AttentionState, call: Operands, scores: torch.Tensor) -> None:
    """Compare with scores [g, n, m] in float64, -inf where a row does not attend a key."""
    size = float(scores.masked_fill(scores == -math.inf, 0.0).abs().max())
    rounding = call.query.shape[-1] ** 0.5 * 2.0**-25 * size  # of float32 scores: their standard deviation, at most
    assert call.shift is not None
    assert call.projection is not None
    keyless = (scores == -math.inf).all(-1)
    weights = torch.where(keyless.unsqueeze(-1), 0.0, (scores - call.shift.double().unsqueeze(-1)).exp())
    den, num = weights.sum(-1), weights @ (call.value.double() @ call.projection.double())
    assert ((state.den - den).abs() <= max(ERROR, 3 * rounding) * den).all()
    assert (state.num - num).norm() <= max(ERROR, rounding) * num.norm()
    assert not state.num[keyless].any()
    assert not state.keys.any(), "a kernel enters nothing in the ledger"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(40))
def test_any_mask_and_terms_give_the_sums_of_weights(name: str, seed: int) -> None:
    call, scores, _ = random_call(random.Random(seed), largest=400 if seed % 4 else 1500)
    given = second_pass(call, scores.logsumexp(-1))
    state = attend(name, given)
    check(state, given, scores)
    attends = torch.from_numpy(call.intervals.bounds.ledger()[0] > 0) if call.intervals else torch.ones(call.rows) > 0
    assert torch.equal(state.max == 0, attends.expand_as(state.max))
    assert (state.max[:, ~attends] == -math.inf).all()


def exact_call(call: Operands) -> tuple[Operands, torch.Tensor]:
    """The second pass of a call without slopes, and its scores in float64."""
    hidden = torch.ones(call.rows, call.keys) > 0 if call.intervals is None else attended(call.intervals, call.keys)
    scores = scores_of(call, hidden, None)
    return second_pass(call, scores.logsumexp(-1)), scores


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.125, 0.3, 0.7])
@pytest.mark.parametrize("heads", [1, 3])
def test_calls_beyond_the_tiles_are_exact_in_every_dtype(name: str, dtype: torch.dtype, scale: float, heads: int) -> None:
    call, scores = exact_call(Operands(*operands(heads, 600, 2500, 64, dtype), Scores(scale)))
    state = attend(name, call)
    check(state, call, scores)
    exact = (scores - call.shift.double().unsqueeze(-1)).exp()
    expected, den = exact @ (call.value.double() @ call.projection.double()), exact.sum(-1)
    assert (state.num / state.den.unsqueeze(-1) - expected / den.unsqueeze(-1)).norm() <= ERROR * expected.norm()
    assert ((state.den - den) / den).norm() <= ERROR * den.numel() ** 0.5
    assert scale > 0.3 or ((state.den - den).abs() <= ERROR * den).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_under_any_mask_calls_add_up_and_so_do_states(name: str, mask: Mask) -> None:
    rows, keys = range(100, mask.queries), range(37, mask.keys)
    tensors = operands(2, len(rows), len(keys), 24)
    call, scores = exact_call(Operands(*tensors, Scores(0.2), make_intervals(mask, rows, keys)))
    told: list[int] = []
    whole = attend(name, replace(call, attended=told.append))
    check(whole, call, scores)
    assert sum(told) == attended(call.intervals, call.keys).sum()
    spans = [call.part(range(call.rows), range(*span)) for span in ((0, 300), (300, call.keys))]
    added, merged = attend(name, *spans), attend(name, spans[0])
    merge(merged, attend(name, spans[1]))
    check(added, call, scores)
    for field in ("num", "den", "max"):
        assert torch.equal(getattr(added, field), getattr(merged, field)), "a merge is an addition"
    assert torch.equal(added.max, whole.max)


@pytest.mark.parametrize("mask", [None, {"causal": True}, {"causal": True, "left": 700}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("with_nan", [False, True])
def test_calls_with_more_keys_than_are_projected_together_are_whole(
    mask: dict | None, with_nan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected, "MOST_TILES", 1)
    rows, keys = range(2300), range(2300)
    intervals = None if mask is None else make_intervals(Mask.of(2300, 2300, **mask), rows, keys)
    query, key, value = operands(2, len(rows), len(keys), 24)
    call, scores = exact_call(Operands(query, key, value, Scores(0.2), intervals))
    told: list[int] = []
    found = attend("weights", replace(call, attended=told.append))
    check(found, call, scores)
    assert sum(told) == (len(rows) * len(keys) if intervals is None else attended(intervals, len(keys)).sum())
    if with_nan:
        value[1500, 3] = math.nan
        met = attend("weights", call).num.isnan().all(-1)
        assert torch.equal(met, (scores[..., 1500] > -math.inf))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.parametrize("causal", [False, True])
def test_the_error_of_large_scores_is_that_of_their_rounding(name: str, size: float, causal: bool) -> None:
    query, key, value = operands(1, 300, 300, 64)
    query[..., 0], key[:, 0] = size**0.5, size**0.5
    call, scores = exact_call(Operands(query, key, value, Scores(1.0), triangle(300) if causal else None))
    assert scores[scores.isfinite()].abs().max() > size
    check(attend(name, call), call, scores)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("terms", [False, True])
def test_rows_without_keys_and_damaged_shifts_are_alone_in_that(name: str, terms: bool) -> None:
    mask = Mask.of(600, 400, causal=True)  # the first 200 rows attend none
    tensors = operands(2, 600, 400, 16)
    call = Operands(*tensors, Scores(0.3, 20.0 if terms else None), make_intervals(mask, range(600), range(400)))
    call, scores = exact_call(call)
    assert (call.shift[:, :200] == -math.inf).all()
    clean = attend(name, call)
    check(clean, call, scores)
    shift, damaged = call.shift.clone(), torch.zeros(2, 600) > 0
    for row, bad in ((3, math.nan), (5, math.inf), (300, math.nan), (301, math.inf), (302, -math.inf), (303, -1e30)):
        shift[1, row], damaged[1, row] = bad, row >= 200
    found = attend(name, replace(call, shift=shift))
    for field in ("num", "den", "max"):
        of_found, of_clean = getattr(found, field), getattr(clean, field)
        assert torch.equal(of_found[~damaged], of_clean[~damaged])
    assert not ((found.den[damaged] - 1).abs() < 0.5).any(), "a damaged row shows"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", [{"left": 100, "right": 80}, {"causal": True}, {"left": 3, "right": 0}, {}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("terms", [False, True])
def test_what_is_not_finite_reaches_the_rows_that_attend_it(name: str, options: dict, bad: float, terms: bool) -> None:
    edges = np.array([0, 100, 1400])
    intervals = make_intervals(Mask(edges, edges, **options), range(1400), range(1400))
    query, key, value = operands(2, 1400, 1400, 8)
    call = Operands(query, key, value, Scores(0.2), intervals, key_bias=torch.zeros(1, 1400) if terms else None)
    call, _ = exact_call(call)
    clean, reached = attend(name, call), attended(intervals, 1400)[:, [20, 750]].any(-1)
    spoilt = value.clone()
    spoilt[[20, 750], 3] = bad
    state = attend(name, replace(call, value=spoilt))
    assert torch.equal(~state.num.isfinite().all(-1), reached.expand(2, -1))
    assert torch.equal(state.den, clean.den)
    spoilt = key.clone()
    spoilt[[20, 750]] = bad
    state = attend(name, replace(call, key=spoilt))
    assert torch.equal(state.num[:, ~reached], clean.num[:, ~reached])
    scores = torch.einsum("gnd,md->gnm", query, spoilt[[20, 750]])
    spoils = attended(intervals, 1400)[:, [20, 750]] & (scores.isnan() | (scores == math.inf))
    assert torch.equal(~state.den.isfinite(), spoils.any(-1))
    query[1, 40] = bad
    state = attend(name, call)
    assert not state.den[1, 40].isfinite()
    assert state.den.isfinite().sum() == 2 * 1400 - 1


@pytest.mark.parametrize("name", KERNELS)
def test_weights_too_small_for_float32_are_0_and_the_callers_setting_stays(name: str) -> None:
    query, key, value = operands(1, 50, 60, 4)
    call = Operands(query * 0, key, value, Scores(1.0))
    small, before = torch.full((10,), 1e-40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # all is computed in this thread
        state = attend(name, second_pass(call, torch.full((1, 50), 90.0)))
    finally:
        torch.set_num_threads(before)
    assert (small + small).all()
    assert not state.den.any()
    assert not state.num.any()


@pytest.mark.parametrize("name", KERNELS)
def test_shifts_lose_nothing_in_float32(name: str) -> None:
    query, key, value = operands(1, 50, 1, 4)  # a sum of one weight has no error of its own
    call = second_pass(Operands(query * 0, key, value, Scores(1.0)), torch.linspace(0.1, 80, 50)[None])
    expected = (-call.shift.double()).exp()
    assert ((attend(name, call).den - expected).abs() <= 2.0**-22 * expected).all()


@pytest.mark.parametrize("name", KERNELS)
def test_rows_whose_every_key_has_a_bias_of_minus_infinity_weigh_nothing(name: str) -> None:
    bias = torch.zeros(1, 300)
    bias[:, :70] = -math.inf
    call = Operands(*operands(2, 300, 300, 8), Scores(0.2), triangle(300), key_bias=bias)
    call, scores = exact_call(call)
    state = attend(name, call)
    check(state, call, scores)
    assert not state.den[:, :70].any()
    assert not state.max.any()


def documents(edges: list[int], **options: object) -> Operands:
    mask = Mask(np.array(edges), np.array(edges), **options)
    every = range(edges[-1])
    return Operands(*operands(2, len(every), len(every), 24), Scores(0.2), make_intervals(mask, every, every))


BIT_CALLS = {
    **{f"seed {seed}": lambda seed=seed: random_call(random.Random(seed), largest=1500)[0] for seed in range(300, 312)},
    **{f"{n} rows": lambda n=n: Operands(*operands(1, n, 3000, 64, torch.float16), Scores(0.1)) for n in (1, 37, 1000)},
    "1 row of 1,024": lambda: Operands(*operands(1, 1, 3000, 1024), Scores(0.03)),
    "causal": lambda: Operands(*operands(4, 1100, 1100, 64), Scores(0.1), triangle(1100)),
    "documents": lambda: documents([0, 5, 900, 960, 2400, 2433, 4000], causal=True),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", BIT_CALLS)
def test_bits_depend_neither_on_threads_nor_on_alignment(name: str, case: str) -> None:
    call = BIT_CALLS[case]()
    call = second_pass(call, torch.full(call.query.shape[:2], 8.0))
    found, before = [], torch.get_num_threads()
    try:
        for threads, offset in ((1, 0), (2, 0), (5, 3)):
            torch.set_num_threads(threads)
            moved = {
                field: torch.cat([tensor.new_zeros(offset), tensor.flatten()])[offset:].view(tensor.shape)
                for field in ("query", "key", "value", "shift", "projection")
                if (tensor := getattr(call, field)) is not None
            }
            state = attend(name, replace(call, **moved))
            found.append([tensor.numpy().tobytes() for tensor in (state.num, state.den, state.max)])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", KERNELS)
def test_misfits_are_refused(name: str) -> None:
    query, key, value = operands(2, 6, 5, 8)
    call = second_pass(Operands(query, key, value, Scores(1.0)), torch.zeros(2, 6))
    for misfit in ({"shift": torch.zeros(2, 5)}, {"projection": torch.zeros(7, 8)}, {"projection": torch.zeros(8)}):
        with pytest.raises(ValueError, match="expected"):
            replace(call, **misfit)
    for missing in ({"shift": None}, {"projection": None}):
        with pytest.raises(ValueError, match="expected operands of a second pass"):
            get_kernel(name).attend(replace(call, **missing), AttentionState.empty(2, 6, 8))
    with pytest.raises(ValueError, match="expected"):
        get_kernel(name).attend(call, AttentionState.empty(2, 6, 9))
