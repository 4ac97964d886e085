"""Our own kernel for Hopper GPUs: what the compiler makes of it, and what only it promises."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from calling import call

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from on_gpu import CUDA, bound_of, check, exact, finished, kernel_for, operands, poisoned_state

from oocattn.kernels.cuda import launch as attending
from oocattn.kernels.cuda.launch import Variant, program_for
from oocattn.kernels.intervals import Intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Bounds, Ramps
from oocattn.problem.scores import Scores

CALLS = [
    *[("hopper", dtype, (dim, dim)) for dtype in ("float16", "bfloat16") for dim in (40, 64, 128)],
    ("hopper", "float16", (192, 128)),
    ("hopper", "float16", (256, 64)),
    ("hopper", "bfloat16", (64, 256)),
    ("hopper", "bfloat16", (192, 192)),
    ("hopper", "bfloat16", (256, 256)),
    *[("hopper", "float32", (dim, dim)) for dim in (40, 64, 128)],
    ("hopper-precise", "float16", (64, 64)),
    ("hopper-precise", "bfloat16", (128, 128)),
]
"""Kernels, dtypes, D and Dv."""
every_call = pytest.mark.parametrize(("name", "dtype", "dims"), CALLS)


def of_band(rows, keys, lower, upper):
    """The intervals of rows that attend keys [i + lower, i + upper)."""
    zero = np.array([0])
    stop, resume = (Ramps(np.array([offset]), zero, np.array([keys])) for offset in (upper, lower))
    return Intervals(rows, keys, Bounds(np.array([0, rows]), zero, stop, zero, resume, zero))


EVERY_TERM = {"listed": True, "softcap": True, "slopes": True, "bias": True}
LONG, LISTED, SPLIT, PRECISE = {"long": True}, {"listed": True}, {"split": True}, {"precise": True}
VARIANTS = [
    ((8, 8), {}, 0),
    ((64, 64), {}, 0),
    ((64, 64), LONG, 0),
    ((96, 96), {}, 0),
    ((128, 128), {}, 0),
    ((128, 128), LONG, 0),
    ((128, 64), {}, 0),
    ((64, 64), SPLIT, 0),
    ((128, 128), SPLIT, 0),
    ((64, 64), LISTED, 48),  # where a step is masked
    ((128, 128), LISTED, 0),
    ((64, 64), EVERY_TERM, 0),
    ((256, 256), {}, 32),
    ((64, 256), LISTED, 16),
]
"""Dimensions, options, and bytes that may be spilled."""
SLOW_VARIANTS = [
    ((8, 8), LONG, 16),
    ((64, 64), LISTED | LONG, 48),
    ((64, 64), SPLIT | LONG, 0),
    ((96, 96), LONG, 0),
    ((128, 64), LONG, 0),
    ((128, 128), LISTED | LONG, 0),
    ((128, 128), SPLIT | LONG, 0),
    ((128, 128), EVERY_TERM | LONG, 96),
    ((192, 128), LONG, 0),
    ((64, 256), LONG, 0),
    ((256, 64), LONG, 0),
    ((256, 256), LISTED, 48),
    ((256, 256), SPLIT, 16),
    ((256, 256), EVERY_TERM, 96),
    ((64, 64), PRECISE | LISTED, 32),
    ((64, 64), PRECISE | EVERY_TERM, 112),
    ((128, 128), PRECISE | LISTED, 0),
    ((128, 128), PRECISE | SPLIT, 0),
    ((128, 128), PRECISE | EVERY_TERM, 16),
]
"""The same of programs that are like others."""

TYPES = (torch.float16, torch.bfloat16)


def variants():
    """Of 16 bits by turns: the code is one. Programs whose numbers or weights have two parts are the same for long calls."""
    for number, variant in enumerate(VARIANTS):
        for other, dtype in enumerate(TYPES):
            yield pytest.param(*variant, dtype, marks=[] if (number + other) % 2 else pytest.mark.slow)
    for number, variant in enumerate(SLOW_VARIANTS):
        yield pytest.param(*variant, TYPES[number % 2], marks=pytest.mark.slow)
    for dim, most_spilled in ((64, 0), (128, 0)):
        yield pytest.param((dim, dim), PRECISE, most_spilled, TYPES[dim == 128])
    for dims, options, most_spilled in (
        ((64, 64), LISTED, 32),
        ((64, 64), SPLIT, 0),
        ((64, 64), EVERY_TERM, 96),
        ((128, 128), LISTED, 48),
        ((128, 128), SPLIT, 32),
        ((128, 128), EVERY_TERM, 80),
    ):
        yield pytest.param(dims, options, most_spilled, torch.float32, marks=pytest.mark.slow)
    for dim, most_spilled in ((64, 0), (128, 48)):
        yield pytest.param((dim, dim), {}, most_spilled, torch.float32)


@pytest.mark.parametrize(("dims", "options", "most_spilled", "dtype"), list(variants()), ids=str)
def test_the_hopper_kernel_compiles_without_a_gpu_and_keeps_to_its_registers(dims, options, most_spilled, dtype):
    report = program_for(Variant(*dims, dtype, **options)).report("sm_90a")  # compiled as for a build
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert max(map(int, spilled.groups())) <= most_spilled, report
    assert re.search(r"Used (128|168) registers", report), report
    assert "serializ" not in report, report  # products that wait for each other


def test_a_build_of_the_hopper_kernel_is_machine_code(tmp_path):
    assert program_for(Variant(64, 64, torch.float16)).build("sm_90a", tmp_path).startswith(b"\x7fELF")


@pytest.mark.gpu
@every_call
@pytest.mark.parametrize(
    ("rows", "keys", "lower", "upper"),
    [
        (777, 333, -777, -99),
        (777, 5000, -777, 301),
        (2000, 2000, -2000, 2),
        (300, 40_000, -300, 39_701),
        (100, 50, -(10**12), 10**12),
        (500, 400, -(10**12), -(10**12) + 1),
        (5000, 5000, -300, 1),
        (5000, 4000, 500, 3900),
        (300, 40_000, 20_000, 40_000),
        (60_000, 60_000, -1000, 1001),
        (900, 1000, 950, 2000),
        (40_000, 40_000, -20_000, 40_000),
    ],
)
def test_a_band_of_keys_may_begin_and_end_anywhere(name, dtype, dims, rows, keys, lower, upper):
    """Also where the first span of a tile is not the first of the call."""
    kernel = kernel_for(name, dtype, *dims)
    query, key, value = operands(3, rows, keys, dims[0], dtype, value_dim=dims[1])
    state = poisoned_state(3, rows, dims[1])
    kernel.attend(Operands(query, key, value, Scores(0.1), of_band(rows, keys, lower, upper)), state)
    out, lse = finished(state)
    for row in {0, 1, 99, 191, 192, rows // 3, rows // 2, rows - 200, rows - 1} & set(range(rows)):
        start, stop = (max(0, min(keys, row + bound)) for bound in (lower, upper))
        if start == stop:
            assert out[:, row].abs().max() == 0
            assert (lse[:, row] == -math.inf).all()
            continue
        index = torch.tensor([row], device=CUDA)
        expected, expected_lse = exact(query, key[start:stop], value[start:stop], 0.1, index, False)
        assert (out[:, row] - expected[:, 0]).norm() <= 4 / 3 * bound_of(name, dtype) * expected.norm()
        assert (lse[:, row] - expected_lse[:, 0]).abs().max() <= 1e-5


@pytest.mark.gpu
@every_call
def test_a_call_gives_the_same_bits_every_time(name, dtype, dims):
    kernel = kernel_for(name, dtype, *dims)
    arguments = operands(3, 10_007, 50_021, dims[0], dtype, value_dim=dims[1])
    states = [poisoned_state(3, 10_007, dims[1]) for _ in range(5)]
    for state in states:
        call(kernel, *arguments, state, scale=0.1, causal=False)
    for state in states[1:]:
        assert torch.equal(state.num, states[0].num)
        assert torch.equal(state.den, states[0].den)


@pytest.mark.gpu
@every_call
def test_a_state_is_continued_by_calls_of_any_length(name, dtype, dims):
    """By programs for short and long calls, of many rows and few."""
    kernel = kernel_for(name, dtype, *dims)
    query, key, value = operands(2, 1000, 50_021, dims[0], dtype, value_dim=dims[1])
    state = poisoned_state(2, 1000, dims[1])
    for first, last in pairwise((0, 100, 30_000, 30_001, 50_021)):
        for rows in (slice(0, 900), slice(900, 1000)):
            part = state.rows(rows.start, rows.stop)
            call(kernel, query[:, rows], key[first:last], value[first:last], part, scale=0.1, causal=False)
    check(state, query, key, value, 0.1, False, bound_of(name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "bounds"),
    [
        ("hopper", "float16", 64, (2.2e-4, 1e-4)),
        ("hopper", "float16", 128, (2.2e-4, 1e-4)),
        ("hopper", "float32", 64, (2e-6, 5e-6)),
        ("hopper", "float32", 128, (2e-6, 5e-6)),
        ("hopper-precise", "float16", 64, (5e-6, 5e-6)),
        ("hopper-precise", "float16", 128, (5e-6, 5e-6)),
    ],
)
def test_long_calls_stay_within_the_bound(name, dtype, head_dim, bounds, mean):
    """Of few rows, whose spans are merged afterwards, and of more, whose spans may be the longest."""
    kernel = kernel_for(name, dtype, head_dim)
    for rows, keys in ((256, 1 << 16), (256, 1 << 22), (600, 1 << 22)):
        query, key, value = operands(1, rows, keys, head_dim, dtype, seed=keys)
        value += mean
        state = poisoned_state(1, rows, head_dim)
        call(kernel, query, key, value, state, scale=head_dim**-0.5, causal=False)
        sampled = torch.arange(0, rows, 3, device=CUDA)
        check(state, query, key, value, head_dim**-0.5, False, bounds[int(mean)], rows=sampled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_are_not_aligned_are_served(dtype):
    kernel = kernel_for("hopper", dtype, 64)
    query, key, value = operands(1, 500, 500, 64, dtype)
    shifted = []
    for tensor in (query, key, value):
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=CUDA)[1:]
        shifted.append(memory.view(tensor.shape).copy_(tensor))
    state = poisoned_state(1, 500, 64)
    call(kernel, *shifted, state, scale=0.125, causal=True)
    check(state, query, key, value, 0.125, True, bound_of("hopper", dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_float32_numbers_of_any_size_are_attended(where, size):
    """Their parts are of 16 bits, and scaled."""
    kernel = kernel_for("hopper", "float32", 64)
    query, key, value = operands(1, 500, 700, 64, "float32")
    {"query": query, "key": key, "value": value}[where].mul_(size)
    scale = 0.125 if where == "value" else 0.125 / size
    state = poisoned_state(1, 500, 64)
    call(kernel, query, key, value, state, scale=scale, causal=False)
    check(state, query, key, value, scale, False, bound_of("hopper", "float32"))


@pytest.mark.parametrize(
    ("name", "dtype", "dims", "most"),
    [
        ("hopper", "float16", (60, 64), 256),
        ("hopper", "bfloat16", (264, 64), 256),
        ("hopper", "bfloat16", (64, 264), 256),
        ("hopper", "float32", (136, 64), 128),
        ("hopper", "float32", (64, 136), 128),
        ("hopper-precise", "float16", (64, 136), 128),
        ("hopper-precise", "bfloat16", (64, 60), 128),
    ],
)
def test_columns_that_it_would_misread_are_refused(name, dtype, dims, most):
    key, value = (torch.zeros(4, dim, dtype=getattr(torch, dtype)) for dim in dims)
    state = AttentionState.empty(1, 4, dims[1])
    with pytest.raises(ValueError, match=rf"D and Dv of {dtype} must be multiples of 8, {most} at most"):
        call(get_kernel(name), key.unsqueeze(0), key, value, state, scale=1.0, causal=True)


def test_float64_is_refused():
    rows = torch.zeros(4, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="it attends float16, bfloat16, float32 only"):
        call(get_kernel("hopper"), rows.unsqueeze(0), rows, rows, AttentionState.empty(1, 4, 64), scale=1.0, causal=True)


def test_a_state_at_odd_addresses_is_refused():
    rows = torch.zeros(4, 64, dtype=torch.float16)
    num = torch.zeros(4 * 64 + 1)[1:].view(1, 4, 64)
    state = AttentionState.without_ledger(num, torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="multiples of 8 bytes"):
        call(get_kernel("hopper"), rows.unsqueeze(0), rows, rows, state, scale=1.0, causal=True)


@pytest.mark.gpu
def test_a_machine_that_cannot_compile_it_says_so_in_one_line(monkeypatch):
    kernel = kernel_for("hopper", "float16", 64)

    def fail(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(attending, "attend", fail)
    refusal = type(kernel)._refusal
    refusal.cache_clear()
    try:
        assert (
            get_kernel("hopper").unsupported_reason(CUDA, "float16", 64, 64)
            == "it cannot be compiled or loaded here: no compiler"
        )
    finally:
        refusal.cache_clear()
