"""Our own kernel for Hopper GPUs: what the compiler makes of it, how it is cut, and what only it promises."""

import math
import re

import numpy as np
import pytest
import torch
from calling import call

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from on_gpu import CUDA, check, exact, finished, kernel_for, operands, poisoned_state

from oocattn.kernels.cuda import launch as attending
from oocattn.kernels.cuda.items import KEYS_OF_STEP, PROCESSORS, choose_span, split_span, steps_of_items
from oocattn.kernels.cuda.launch import Variant, program_for
from oocattn.kernels.intervals import Band, Intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Bounds, Ramps
from oocattn.problem.scores import Scores

every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def of_band(rows, keys, lower, upper):
    """The intervals of rows that attend keys [i + lower, i + upper)."""
    zero = np.array([0])
    stop, resume = (Ramps(np.array([offset]), zero, np.array([keys])) for offset in (upper, lower))
    return Intervals(rows, keys, Bounds(np.array([0, rows]), zero, stop, zero, resume, zero))


VARIANTS = [
    ((8, 8), {}, 0),
    ((64, 64), {}, 0),
    ((96, 96), {}, 0),
    ((128, 128), {}, 0),
    ((128, 64), {}, 0),
    ((64, 64), {"split": True}, 0),
    ((128, 128), {"split": True}, 0),
    ((64, 64), {"listed": True}, 64),  # where a step is masked
    ((128, 128), {"listed": True}, 0),
    ((64, 64), {"listed": True, "softcap": True, "slopes": True, "bias": True}, 64),
]
"""Dimensions, options, and bytes that may be spilled."""

TYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("dims", "options", "most_spilled", "dtype"),
    [
        pytest.param(*variant, dtype, marks=[] if (number + other) % 2 else pytest.mark.slow)  # by turns: the code is one
        for number, variant in enumerate(VARIANTS)
        for other, dtype in enumerate(TYPES)
    ],
    ids=str,
)
def test_the_hopper_kernel_compiles_without_a_gpu_and_keeps_to_its_registers(dims, options, most_spilled, dtype):
    report = program_for(Variant(*dims, dtype, **options)).report("sm_90a")  # compiled as for a build
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert max(map(int, spilled.groups())) <= most_spilled, report
    assert re.search(r"Used (128|168) registers", report), report
    assert "serializ" not in report, report  # products that wait for each other


def test_a_build_of_the_hopper_kernel_is_machine_code(tmp_path):
    assert program_for(Variant(64, 64, torch.float16)).build("sm_90a", tmp_path).startswith(b"\x7fELF")


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(
    ("rows", "keys", "lower", "upper"),
    [
        (1, 1, -1, 1),
        (300, 65_537, -300, 65_537),
        (1000, 1000, -1000, 1),
        (777, 333, -777, -99),
        (100, 5000, -100, 301),
        (500, 400, -500, -499),
        (5000, 5000, -300, 1),  # windows: the first spans of most tiles are not the first ones
        (5000, 4000, 500, 3900),
        (300, 40_000, 20_000, 40_000),
        (900, 1000, 950, 2000),
    ],
)
@pytest.mark.parametrize("tile", [128, 192])
def test_items_cover_every_pair_of_tile_and_step_once_and_in_order(group_size, rows, keys, lower, upper, tile):
    band = Band(lower, upper)
    span = choose_span(group_size, rows, keys, band, tile)
    assert span % KEYS_OF_STEP == 0
    assert 0 < span <= 16_384
    row, key = np.arange(rows)[:, None], np.arange(keys)
    attended = (row + lower <= key) & (key < row + upper)
    expected = []
    for first in range(0, keys, span):
        for tile_rows in reversed([attended[row : row + tile] for row in range(0, rows, tile)]):
            blocks = [
                tile_rows[:, key : min(key + KEYS_OF_STEP, first + span)].any()
                for key in range(first, min(first + span, keys), KEYS_OF_STEP)
            ]
            expected += group_size * [sum(blocks)] if any(blocks) else []
    assert steps_of_items(group_size, rows, keys, band, tile, span) == expected


@pytest.mark.parametrize(
    ("rows", "tile", "least"), [(65_536, 192, 0.96), (65_536, 128, 0.96), (16_384, 192, 0.94), (16_384, 128, 0.94)]
)
def test_spans_fill_the_multiprocessors(rows, tile, least):
    band = Band(-rows, 65_536)
    span = choose_span(1, rows, 65_536, band, tile)
    items = steps_of_items(1, rows, 65_536, band, tile, span)
    assert sum(items) / (PROCESSORS * math.ceil(len(items) / PROCESSORS) * max(items)) >= least


@pytest.mark.parametrize(
    ("rows", "keys", "tile"), [(512, 65_536, 128), (512, 65_536, 192), (3, 4096, 192), (1000, 131_072, 128)]
)
def test_spans_of_few_rows_fill_the_multiprocessors_once(rows, keys, tile):
    span = split_span(rows, keys, tile)
    tiles = math.ceil(rows / tile)
    assert span % KEYS_OF_STEP == 0
    assert span <= 16_384
    assert tiles * math.ceil(keys / span) <= PROCESSORS
    assert span == KEYS_OF_STEP or tiles * math.ceil(keys / (span - KEYS_OF_STEP)) > PROCESSORS - tiles


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("head_dim", [40, 64, 128])
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
def test_a_band_of_keys_may_begin_and_end_anywhere(dtype, head_dim, rows, keys, lower, upper):
    """Also where the first span of a tile is not the first of the call."""
    kernel_for("hopper", dtype, head_dim)
    query, key, value = operands(3, rows, keys, head_dim, dtype)
    state = poisoned_state(3, rows, head_dim)
    operands_of_call = Operands(query, key, value, Scores(0.1), of_band(rows, keys, lower, upper))
    get_kernel("hopper").attend(operands_of_call, state)
    out, lse = finished(state)
    for row in {0, 1, 99, 191, 192, rows // 3, rows // 2, rows - 200, rows - 1} & set(range(rows)):
        start, stop = (max(0, min(keys, row + bound)) for bound in (lower, upper))
        if start == stop:
            assert out[:, row].abs().max() == 0
            assert (lse[:, row] == -math.inf).all()
            continue
        index = torch.tensor([row], device=CUDA)
        expected, expected_lse = exact(query, key[start:stop], value[start:stop], 0.1, index, False)
        assert (out[:, row] - expected[:, 0]).norm() <= (5e-4 if dtype == "float16" else 4e-3) * expected.norm()
        assert (lse[:, row] - expected_lse[:, 0]).abs().max() <= 1e-5


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_call_gives_the_same_bits_every_time(dtype, head_dim):
    kernel = kernel_for("hopper", dtype, head_dim)
    arguments = operands(3, 10_007, 50_021, head_dim, dtype)
    states = [poisoned_state(3, 10_007, head_dim) for _ in range(5)]
    for state in states:
        call(kernel, *arguments, state, scale=0.1, causal=False)
    for state in states[1:]:
        assert torch.equal(state.num, states[0].num)
        assert torch.equal(state.den, states[0].den)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("mean", "bound"), [(0.0, 2.2e-4), (1.0, 1e-4)])
def test_long_calls_stay_within_the_bound(head_dim, mean, bound):
    kernel = kernel_for("hopper", "float16", head_dim)
    for keys in (1 << 16, 1 << 22):
        query, key, value = operands(1, 256, keys, head_dim, "float16", seed=keys)
        value += mean
        state = poisoned_state(1, 256, head_dim)
        call(kernel, query, key, value, state, scale=head_dim**-0.5, causal=False)
        rows = torch.arange(256, device=CUDA)
        check(state, query, key, value, head_dim**-0.5, False, "float16", rows=rows, out_error=bound)


@pytest.mark.gpu
def test_rows_that_are_not_aligned_are_served():
    kernel = kernel_for("hopper", "float16", 64)
    query, key, value = operands(1, 500, 500, 64, "float16")
    shifted = []
    for tensor in (query, key, value):
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=CUDA)[1:]
        shifted.append(memory.view(tensor.shape).copy_(tensor))
    state = poisoned_state(1, 500, 64)
    call(kernel, *shifted, state, scale=0.125, causal=True)
    check(state, query, key, value, 0.125, True, "float16")


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("float16", 60), ("float16", 136)])
def test_what_it_would_misread_is_refused(dtype, head_dim):
    rows = torch.zeros(4, head_dim, dtype=getattr(torch, dtype))
    state = AttentionState.empty(1, 4, head_dim)
    with pytest.raises(ValueError, match=r"expected float16 or bfloat16, multiples of 8 up to 128"):
        call(get_kernel("hopper"), rows.unsqueeze(0), rows, rows, state, scale=1.0, causal=True)


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
