"""Every GPU kernel on random masks, terms and dimensions, against a dense mask in float64."""

import math
import random

import numpy as np
import pytest
import torch
from any_mask import Terms, attended, by_dense_mask, make_operands, random_intervals, random_mask
from on_gpu import CUDA, bound_of, finished, kernel_for, poisoned_state

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import device_type, get_kernel, kernel_names
from oocattn.problem.calls import CallSize
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores

pytestmark = pytest.mark.gpu

KERNELS = [name for name in kernel_names() if device_type(name) == "cuda"]
KINDS = [("float16", 64, 64), ("bfloat16", 64, 64), ("bfloat16", 128, 128), ("float16", 40, 120), ("float16", 128, 64)]
TERMS = [
    Terms(),
    Terms(),
    Terms(),
    Terms(softcap=3.0),
    Terms(slopes=True),
    Terms(bias="one"),
    Terms(bias="each"),
    Terms(softcap=20.0, slopes=True, bias="each"),
]


OTHER_KINDS = {
    "hopper": [
        ("float16", 256, 256),
        ("bfloat16", 192, 128),
        ("bfloat16", 64, 256),
        ("float16", 256, 64),
        ("float32", 64, 64),
        ("float32", 128, 128),
        ("float32", 40, 120),
    ],
    "hopper-precise": [("float16", 64, 64), ("bfloat16", 128, 128), ("float16", 40, 120), ("bfloat16", 128, 64)],
}
OTHER_TERMS = [Terms(), Terms(), Terms(softcap=20.0, slopes=True, bias="each")]
"""Fewer, because each has a program of its own."""
EVERY_WIDTH = [(name, dtype, tuple(dims)) for name, kinds in OTHER_KINDS.items() for dtype, *dims in kinds]


def check(operands, kernel, about):
    dtype = str(operands.query.dtype).removeprefix("torch.")
    heads, rows, value_dim = len(operands.query), operands.rows, operands.value.shape[1]
    state = poisoned_state(heads, rows, value_dim)
    kernel.attend(operands, state)
    out, lse = finished(state)
    expected, expected_lse = by_dense_mask(operands)
    dead = expected_lse == -math.inf
    bound = 1.2 * bound_of(kernel.name, dtype)
    if operands.slopes and not dead.all():  # of rows that attend keys far away alone: float32 rounds their scores
        bound += 2e-7 * float(expected_lse[~dead].abs().max())
    assert (out - expected).norm() <= bound * expected.norm() + 1e-9, about
    found = (lse - expected_lse)[~dead].abs()
    assert not len(found) or (found <= 3e-5 + 3e-7 * expected_lse[~dead].abs()).all(), about
    assert (lse[dead] == -math.inf).all(), about
    assert not out[dead].any(), about


def check_random_calls(name, kinds, terms_of_scores, seed, cases):
    rng = random.Random(seed)
    tried = 0
    for case in range(cases):
        dtype, *dims = rng.choice(kinds)
        kernel = get_kernel(name)
        if kernel.unsupported_reason(CUDA, dtype, *dims):
            continue
        tried += 1
        mask = random_mask(rng)
        intervals = random_intervals(rng, mask)
        heads, terms = rng.choice([1, 1, 3, 8]), rng.choice(terms_of_scores)
        operands = make_operands(intervals, heads, dims, dtype, terms, seed=case)
        about = (seed, case, dtype, dims, str(mask), heads, terms, intervals.rows, intervals.keys)
        check(operands, kernel, about)
    if not tried:
        pytest.skip("it serves none of these")


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "hopper-precise"])
@pytest.mark.parametrize("seed", range(4))
def test_any_mask_and_terms_are_attention(name, seed):
    check_random_calls(name, KINDS, TERMS, seed, 60 if name == "hopper" else 8)


@pytest.mark.parametrize("name", OTHER_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_any_mask_of_wide_float32_and_precise_calls_is_attention(name, seed):
    check_random_calls(name, OTHER_KINDS[name], OTHER_TERMS, seed, 5 * len(OTHER_KINDS[name]))


FEW_ROWS = [(8, 64, 9001), (1, 1, 20_000), (5, 130, 4096), (3, 7, 140_001)]
"""Heads, rows and keys."""


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("terms", [Terms(), Terms(softcap=5.0), Terms(bias="one"), Terms(bias="each")], ids=str)
@pytest.mark.parametrize(("heads", "rows", "keys"), FEW_ROWS)
def test_few_rows_are_attention(dims, terms, heads, rows, keys):
    kernel = kernel_for("hopper", "bfloat16", dims[0])
    check(make_operands(None, heads, dims, "bfloat16", terms, size=(rows, keys)), kernel, "")


@pytest.mark.parametrize(("name", "dtype", "dims"), EVERY_WIDTH)
@pytest.mark.parametrize(("heads", "rows", "keys"), FEW_ROWS)
def test_few_rows_of_wide_float32_and_precise_calls_are_attention(name, dtype, dims, heads, rows, keys):
    kernel = kernel_for(name, dtype, *dims)
    check(make_operands(None, heads, dims, dtype, Terms(), size=(rows, keys)), kernel, "")


@pytest.mark.parametrize(
    ("name", "dtype", "dim"),
    [*[(name, "float16", 64) for name in KERNELS], ("hopper", "float32", 64), ("hopper", "bfloat16", 256)],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_near_the_rows_that_attend_it(name, dtype, dim, bad):
    """Also where the last keys of a document share a step with those of the next one."""
    kernel = kernel_for(name, dtype, dim)
    edges = torch.tensor([0, 3003, 4500]).numpy()
    for options in ({}, {"causal": True}, {"causal": True, "left": 100, "sinks": 5}):
        mask = Mask(edges, edges, **options)
        intervals = make_intervals(mask, range(4500), range(4500))
        operands = make_operands(intervals, 2, (dim, dim), dtype, Terms())
        clean, spoilt = poisoned_state(2, 4500, dim), poisoned_state(2, 4500, dim)
        kernel.attend(operands, clean)
        operands.value[3003:3010] = bad
        operands.key[3003:3010] = bad
        kernel.attend(operands, spoilt)
        out, expected = finished(spoilt)[0], finished(clean)[0]
        met = attended(intervals)[:, 3003:3010].any(-1)
        assert not out[:, met].isfinite().any()
        far = torch.ones(4500, dtype=torch.bool, device=CUDA)
        for row in torch.nonzero(met)[::64].flatten().tolist():
            far[max(0, row - 512) : row + 512] = False
        assert far.any()
        assert torch.equal(out[:, far & ~met], expected[:, far & ~met])


@pytest.mark.parametrize(
    ("name", "dtype", "dims"),
    [*[("hopper", dtype, (dim, dim)) for dtype in ("float16", "bfloat16") for dim in (64, 128)], *EVERY_WIDTH],
)
def test_listed_calls_give_the_same_bits_every_time(name, dtype, dims):
    kernel = kernel_for(name, dtype, *dims)
    edges = torch.tensor([0, 10_000, 10_001, 30_000, 50_000]).numpy()
    mask = Mask(edges, edges, causal=True, left=25_000, sinks=9)
    intervals = make_intervals(mask, range(50_000), range(50_000))
    operands = make_operands(intervals, 2, dims, dtype, Terms())
    states = [poisoned_state(2, 50_000, dims[1]) for _ in range(4)]
    for state in states:
        kernel.attend(operands, state)
    for state in states[1:]:
        assert torch.equal(state.num, states[0].num)
        assert torch.equal(state.den, states[0].den)


def test_padding_by_a_large_negative_bias_weighs_alike():
    kernel = kernel_for("hopper", "float16", 64)
    for size in (-1e4, -1e9, -1e30, torch.finfo(torch.float32).min):
        operands = make_operands(None, 2, (64, 64), "float16", Terms(bias="one"), size=(300, 1000))
        operands.query[:] = 0
        operands.key_bias[:] = size
        state = poisoned_state(2, 300, 64)
        kernel.attend(operands, state)
        out, _ = finished(state)
        expected = operands.value.double().mean(0).expand_as(out)
        assert (out - expected).norm() <= 1e-3 * expected.norm(), size


def test_more_documents_than_a_launch_holds():
    kernel = kernel_for("hopper", "float16", 64)
    edges = torch.arange(0, 3003, 3).numpy()
    mask = Mask(edges, edges, causal=True)
    intervals = make_intervals(mask, range(3000), range(3000))
    operands = make_operands(intervals, 1, (64, 64), "float16", Terms(slopes=True))
    check(operands, kernel, "")


def test_more_heads_than_a_launch_holds():
    kernel = kernel_for("hopper", "float16", 64)
    intervals = make_intervals(Mask.of(9, 20, causal=True), range(9), range(20))
    check(make_operands(intervals, 300, (64, 64), "float16", Terms(slopes=True, bias="each")), kernel, "")


def test_no_step_is_walked_that_no_row_of_a_tile_attends():
    """Rows of a step far from all others: keys that are NaN there do not matter, for they are not loaded."""
    kernel = kernel_for("hopper", "float16", 64)
    mask = Mask.of(20_000, 20_000, causal=True, left=200, sinks=4)
    rows = range(15_000, 16_000)
    intervals = make_intervals(mask, rows, range(20_000))
    query, key, value = (torch.randn(*shape, 64, device=CUDA).half() for shape in ((1, 1000), (20_000,), (20_000,)))
    key[300:14_000], value[300:14_000] = math.nan, math.nan
    state = poisoned_state(1, 1000, 64)
    kernel.attend(Operands(query, key, value, Scores(0.125), intervals), state)
    assert state.num.isfinite().all()


@pytest.mark.parametrize(
    ("name", "dtype", "dims"),
    [("hopper", "bfloat16", (64, 64)), ("hopper", "float32", (64, 64)), ("hopper", "float16", (256, 256))],
)
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize(("rows", "documents"), [(40_000, 40), (40_000, 3), (9000, 3000)])
def test_scratch_of_a_masked_call_is_within_its_bound(name, dtype, dims, rows, documents, slopes):
    kernel = kernel_for(name, dtype, *dims)
    edges = np.linspace(0, rows, documents + 1).astype(np.int64)
    intervals = make_intervals(Mask(edges, edges, causal=True, left=500, sinks=3), range(rows), range(rows))
    given = make_operands(intervals, 2, dims, dtype, Terms(slopes=slopes))
    state = poisoned_state(2, rows, dims[1])
    kernel.attend(given, state)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    kernel.attend(given, state)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_reserved() - before
    assert grown <= kernel.scratch_bytes(CallSize(2, rows, rows, *dims, dtype, plain=not slopes, masked=True))
