"""The kernels that run on a CPU on random masks, terms, dimensions and dtypes, against a dense mask in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import operands
from random_masks import random_call, random_intervals, scores_of
from reference import mask_by_definition

from oocattn.kernels.cuda.far import brought_near, continued_far_away
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.plain import CachedKernel
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

KERNELS = ("cpu", "reference", "torch")


def attended_by(name: str, *calls: Operands) -> AttentionState:
    """The state of the calls of some rows, one after the other."""
    state = AttentionState.empty(*calls[0].query.shape[:2], calls[0].value.shape[1])
    for call in calls:
        get_kernel(name).attend(call, state)
    return state


def check(state: AttentionState, scores: torch.Tensor, value: torch.Tensor, about: object = "") -> None:
    """Compare a state with float64; rows without a key are as they were."""
    out, lse = torch.full(state.num.shape, math.nan), torch.full(state.den.shape, math.nan)
    finalise(state, out, lse)
    expected, expected_lse = scores.softmax(-1).nan_to_num(0.0) @ value, scores.logsumexp(-1)
    dead = expected_lse == -math.inf
    assert (out - expected).norm() <= 4e-6 * expected.norm() + 1e-30, about
    found = (lse - expected_lse)[~dead].abs()
    assert (found <= 1e-5 + 1e-6 * expected_lse[~dead].abs()).all(), about
    assert not state.num[dead].any(), about
    assert not state.den[dead].any(), about
    assert (state.max[dead] == -math.inf).all(), about


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(40))
def test_any_mask_and_terms_are_attention(name: str, seed: int) -> None:
    call, scores, value = random_call(random.Random(seed), largest=400 if seed % 4 else 1500)
    check(attended_by(name, call), scores, value, call.scores)


@pytest.mark.parametrize("seed", range(20))
def test_any_mask_in_two_calls_is_attention(seed: int) -> None:
    call, scores, value = random_call(random.Random(100 + seed), largest=900)
    cut = call.keys // 3
    rows = range(call.rows)
    check(attended_by("cpu", call.part(rows, range(cut)), call.part(rows, range(cut, call.keys))), scores, value)


@pytest.mark.parametrize("seed", range(40))
def test_the_reach_of_intervals_has_every_key_that_is_attended(seed: int) -> None:
    intervals, attended = random_intervals(random.Random(seed), 300, (0, 3, 40))
    keys = np.flatnonzero(attended.any(axis=0))
    assert all(key in intervals.reach for key in keys.tolist())
    assert 0 <= intervals.reach.start <= intervals.reach.stop <= attended.shape[1]


def test_the_reach_of_a_window_and_of_documents_ends_with_their_keys() -> None:
    assert make_intervals(Mask.of(1000, 1000, causal=True, left=50), range(300, 500), range(1000)).reach == range(250, 500)
    documents = Mask(np.array([0, 100, 200]), np.array([0, 400, 700]))
    assert make_intervals(documents, range(100), range(900)).reach == range(400)


def packed(edges: list[int], **options: object) -> tuple[Mask, np.ndarray, np.ndarray]:
    """A mask of documents, what it is by definition, and distances."""
    mask = Mask(np.array(edges), np.array(edges), **options)
    asked = {"causal": mask.causal, "window_size": (mask.left, mask.right), "cu_seqlens_q": edges}
    (attended,), (distances,) = mask_by_definition(1, edges[-1], edges[-1], **asked, sink_tokens=mask.sinks)
    return mask, attended, distances


@pytest.mark.parametrize(
    ("edges", "options"),
    [
        ([0, 2200, 2250, 3300], {"causal": True}),
        ([0, 700, 700, 1400, 2100, 2800], {"causal": True}),
        ([0, 3, 40, 45, *range(60, 2000, 60), 2400], {"causal": True}),
        ([0, 1100, 2500], {}),
        ([0, 3000], {"causal": True, "left": 1100, "sinks": 5}),
        ([0, 1700], {"left": 300, "right": 100}),
        ([0, 2000, 3000], {"causal": True, "left": 65}),
        ([0, 1500], {"left": None, "right": 70}),
        ([0, 1500], {"left": 70, "right": None}),
    ],
    ids=str,
)
def test_long_documents_and_windows_are_attention(edges: list[int], options: dict) -> None:
    mask, attended, distances = packed(edges, **options)
    every = range(edges[-1])
    call = Operands(*operands(1, len(every), len(every), 16), Scores(0.25), make_intervals(mask, every, every))
    check(attended_by("cpu", call), scores_of(call, attended, distances), call.value.double())


@pytest.mark.parametrize("options", [{"left": 100, "right": 80}, {"causal": True}, {"left": 3, "right": 0}], ids=str)
def test_scores_of_a_thousand_under_a_mask(options: dict) -> None:
    mask, attended, distances = packed([0, 300, 700], **options)
    query, key, value = operands(2, 700, 700, 16)
    call = Operands(query.sign() * 7.9, key.sign() * 7.9, value, Scores(1.0), make_intervals(mask, range(700), range(700)))
    scores = scores_of(call, attended, distances)
    assert scores.abs()[scores.isfinite()].max() > 900
    state = attended_by("cpu", call)
    out, lse = torch.empty_like(state.num), torch.empty_like(state.den)
    finalise(state, out, lse)
    expected = scores.softmax(-1) @ value.double()
    assert (out - expected).norm() <= 1e-4 * expected.norm()  # a score of 1,000 is known to 6e-5 in float32
    assert (lse - scores.logsumexp(-1)).abs().max() <= 1e-3


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", [{"left": 100, "right": 80}, {"causal": True}, {"left": 3, "right": 0}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_rows_that_attend_it_and_no_others(name: str, options: dict, bad: float) -> None:
    mask, attended, _ = packed([0, 100, 400], **options)
    query, key, value = operands(2, 400, 400, 8)
    value[[20, 250]] = bad
    call = Operands(query, key, value, Scores(0.2), make_intervals(mask, range(400), range(400)))
    for terms in ({}, {"slopes": (0.01, 0.02), "key_bias": torch.randn(2, 400)}):
        state = attended_by(name, replace(call, **terms))
        reached = torch.from_numpy(attended[:, [20, 250]].any(1))
        assert torch.equal(~state.num.isfinite().all(-1), reached.expand(2, 400))
        assert state.den.isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_rows_whose_every_key_has_a_bias_of_minus_infinity_stay_without_a_key(name: str) -> None:
    mask, attended, distances = packed([0, 50, 300], causal=True)
    call = Operands(*operands(2, 300, 300, 8), Scores(0.2), make_intervals(mask, range(300), range(300)))
    bias = torch.zeros(1, 300)
    bias[:, 50:120] = -math.inf
    call = replace(call, key_bias=bias)
    scores = scores_of(call, attended, distances)
    assert (scores.logsumexp(-1) == -math.inf).sum() == 2 * 70
    check(attended_by(name, call), scores, call.value.double())


def bits(state: AttentionState) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in (state.num, state.den, state.max)]


def few_rows(rows: int, head_dim: int) -> Operands:
    """A call of few rows against many keys, with a bias: sums of a product that threads divide."""
    tensors = operands(1, rows, 3000, head_dim)
    return Operands(*tensors, Scores(head_dim**-0.5), key_bias=tensors[1][:, 0].clone()[None])


BIT_CALLS = {
    **{f"seed {seed}": lambda seed=seed: random_call(random.Random(seed), largest=1500)[0] for seed in range(200, 225)},
    **{f"{rows} rows, D = {dim}": lambda rows=rows, dim=dim: few_rows(rows, dim) for rows in (1, 37) for dim in (8, 1024)},
}


@pytest.mark.parametrize("name", BIT_CALLS)
def test_bits_under_any_mask_depend_neither_on_threads_nor_on_alignment(name: str) -> None:
    call = BIT_CALLS[name]()
    found, before = [], torch.get_num_threads()
    try:
        for threads, offset in ((1, 0), (2, 0), (2, 3)):
            torch.set_num_threads(threads)
            query, key, value = (
                torch.cat([tensor.new_zeros(offset), tensor.flatten()])[offset:].view(tensor.shape)
                for tensor in (call.query, call.key, call.value)
            )
            found.append(bits(attended_by("cpu", replace(call, query=query, key=key, value=value))))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_narrow_window_has_tiles_near_its_own_keys_only() -> None:
    mask = Mask.of(16_384, 16_384, left=4, right=0, sinks=2)
    rows = torch.zeros(16_384, 1)
    call = Operands(rows[None], rows, rows, Scores(1.0), make_intervals(mask, range(16_384), range(16_384)))
    pairs = sum(len(rows) * len(keys) for rows, keys in CachedKernel().tiles(call))
    assert mask.pairs() < pairs <= 16_384 * (512 + 4 + 2)


def far_call(far: int, before: bool, rows: int, keys: int) -> tuple[Operands, torch.Tensor, torch.Tensor]:
    """A call of two heads with slopes, rows and keys `far` apart; its scores but for what all keys share; that, by row."""
    mask, part = (Mask.of(rows, keys + far), range(rows)) if before else (Mask.of(rows + far, keys), range(rows))
    generator = torch.Generator().manual_seed(far)
    query, key, value = (torch.randn(shape, generator=generator) for shape in ((2, rows, 16), (keys, 16), (keys, 9)))
    slopes = 0.125, -0.01
    call = Operands(query, key, value, Scores(0.25), make_intervals(mask, part, range(keys)), slopes)
    distance = np.abs((np.arange(rows) + mask.keys - mask.queries)[:, None] - np.arange(keys))
    near, shared = (torch.from_numpy(part).double() for part in (distance - distance.min(1, keepdims=True), distance.min(1)))
    weights = torch.tensor(slopes, dtype=torch.float64)[:, None]
    return call, 0.25 * query.double() @ key.double().T - weights[..., None] * near, weights * shared


def check_far(state: AttentionState, call: Operands, scores: torch.Tensor, shared: torch.Tensor, atol: float = 2e-6) -> None:
    """Compare a state with float64, which would not hold what tells keys apart beside what they share."""
    out, lse = torch.empty(state.num.shape), torch.empty(state.den.shape)
    finalise(state, out, lse)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ call.value.double(), rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) - shared, rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("far", [2**24 + 1, 2**25 + 1, 2**31, 2**40])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_distances_tell_keys_apart_that_lie_far_from_their_rows(name: str, before: bool, far: int) -> None:
    """However far away all keys are. Those of several tiles count alike while float32 holds the maximum to within exp."""
    call, scores, shared = far_call(far, before, rows=70, keys=600 if far <= 2**31 else 200)
    for cut in (0, 250 if far <= 2**31 else call.keys):
        parts = (part for part in (range(cut), range(cut, call.keys)) if part)
        check_far(attended_by(name, *(call.part(range(call.rows), part) for part in parts)), call, scores, shared)


@pytest.mark.parametrize("far", [7, 2**30 + 500, 2**31, 2**40])
@pytest.mark.parametrize("before", [True, False])
def test_a_kernel_that_counts_in_32_bits_continues_a_state_far_away(before: bool, far: int) -> None:
    """The call is brought near, and the state raised meanwhile; rows that attended nearer keys keep what they have."""
    call, scores, shared = far_call(far, before, rows=70, keys=200)
    near, distance = brought_near(call.intervals)
    assert np.abs(near.positions()).max() < 1 << 31
    assert distance.any() == (far > 1 << 30)
    assert (np.abs(near.positions()[:, None] - np.arange(200)) + distance[:, None] == distances_of(call)).all()
    state, before_it = AttentionState.empty(2, 70, 9), AttentionState.empty(2, 70, 9)
    with continued_far_away(state, call.slopes, distance):
        get_kernel("torch").attend(replace(call, intervals=near), state)
    check_far(state, call, scores, shared)
    generator = torch.Generator().manual_seed(1)
    for tensor in (before_it.num, before_it.den, before_it.max):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 1)
    kept = replace(before_it, num=before_it.num.clone(), den=before_it.den.clone(), max=before_it.max.clone())
    with continued_far_away(before_it, (0.5, 0.25), distance):
        get_kernel("torch").attend(replace(call, intervals=near, slopes=(0.5, 0.25)), before_it)
    if distance.any():
        for name in ("num", "den", "max"):
            torch.testing.assert_close(getattr(before_it, name), getattr(kept, name), rtol=0, atol=0)


def distances_of(call: Operands) -> np.ndarray:
    return np.abs(call.intervals.positions()[:, None] - np.arange(call.keys))
