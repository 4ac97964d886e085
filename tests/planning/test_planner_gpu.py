"""Plans for GPUs that are made up: budgets, tiles and chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import MIB, asked, check_the_smallest_budget, plan, smallest_named
from support import GPU, a_problem

from oocattn import BudgetError
from oocattn.kernels.registry import get_kernel, max_keys
from oocattn.pipelines.questions import Questions
from oocattn.planning.layout import MOST_ROWS, USUAL_ROWS
from oocattn.planning.machine import Hardware
from oocattn.planning.memory import TOTALS_SLOTS
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import SecondPass

GIB = 1 << 30

ODD_CHUNKS = [
    (1 << 24, 64, "float16", 7),
    (10_000_019, 64, "float16", 1),
    (12_047_147, 128, "float16", 1),
    (7_558_234, 128, "float32", 13),
]


@st.composite
def problems(draw: st.DrawFn, tokens: st.SearchStrategy[int] | None = None) -> Problem:
    """Half of them square and plain, half with all that may be asked."""
    tokens = tokens or st.one_of(st.integers(1, 1 << 24), st.integers(1, 1 << 17), st.sampled_from([1, 1 << 20, 1 << 24]))
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    query_heads = kv_heads * draw(st.sampled_from([1, 3, 8]))
    dtype = draw(st.sampled_from(["float16", "bfloat16"]))
    dims = st.sampled_from([8, 64, 96, 128, 256])
    queries = keys = draw(tokens)
    more: dict[str, Any] = {"head_dim": draw(dims), "causal": draw(st.booleans())}
    if draw(st.booleans()):
        keys = draw(st.one_of(st.just(queries), tokens))
        more |= {"keys": keys, "value_dim": draw(dims), **draw(asked(query_heads, queries, keys))}
    return a_problem(
        queries,
        batch=draw(st.sampled_from([1, 3])),
        query_heads=query_heads,
        kv_heads=kv_heads,
        dtype=dtype,
        out_dtype=draw(st.sampled_from([dtype, "float32"])),
        **more,
    )


gpus = st.builds(
    lambda kernel, lanes, measuring: replace(
        GPU,
        kernel=kernel,
        scratch_bytes=get_kernel(kernel).scratch_bytes,
        max_keys=max_keys(kernel, 64),
        lanes=lanes,
        measuring_bytes=measuring,
    ),
    st.sampled_from(["hopper", "cudnn", "flash", "fa3", "torch"]),
    st.sampled_from([1, 1, 4]),
    st.sampled_from([0, 80 * MIB]),
)
budgets = st.integers(26, 37).map(lambda power: 1 << power)


@given(problems(), gpus, budgets, budgets, st.sampled_from(["auto", "cqs", "strips"]))
@settings(max_examples=60)
def test_peaks_stay_within_the_budgets(problem: Problem, gpu: Hardware, device: int, host: int, decomposition: str) -> None:
    try:
        made = plan(problem, gpu, device_memory=device, host_memory=host, decomposition=decomposition)
    except BudgetError:
        return
    assert made.peak_device <= device
    assert made.peak_host <= host
    assert made.device == "cuda"
    assert made.tiles.key <= gpu.max_keys
    assert made.tiles.query * problem.group_size <= max(MOST_ROWS, USUAL_ROWS * problem.group_size)
    assert 1 <= made.tiles.query <= made.chunk_rows
    assert 1 <= made.tiles.key <= made.key_chunk_rows
    if device >= made.lanes * GIB:  # below 16K rows, over all heads of a group, kernels fall behind
        assert made.tiles.query * problem.group_size >= min(16_384, made.chunk_rows)


@given(problems(), gpus, st.sampled_from(["host_memory", "device_memory"]), st.sampled_from(["auto", "cqs", "strips"]))
@settings(max_examples=15)
def test_the_smallest_budget_that_is_named_works_and_one_mebibyte_less_does_not(
    problem: Problem, gpu: Hardware, name: str, decomposition: str
) -> None:
    check_the_smallest_budget(problem, gpu, name, decomposition)


SURVEYING = replace(
    GPU,
    kernel="hopper-survey",
    scratch_bytes=get_kernel("hopper-survey").scratch_bytes,
    max_keys=max_keys("hopper-survey", 64),
)


def surveyed(problem: Problem) -> Problem:
    """The survey of a result."""
    return replace(problem, out_dtype="float32", second_pass=SecondPass(reduced=Questions().reduced(problem)))


@given(problems(), budgets, budgets, st.sampled_from(["auto", "cqs", "strips"]))
@settings(max_examples=40)
def test_what_a_survey_sums_over_rows_is_in_its_peaks(problem: Problem, device: int, host: int, decomposition: str) -> None:
    problem = surveyed(problem)
    try:
        made = plan(problem, SURVEYING, device_memory=device, host_memory=host, decomposition=decomposition)
    except BudgetError:
        return
    assert made.totals_bytes > 0
    assert TOTALS_SLOTS * made.totals_bytes < made.peak_device <= device
    assert made.totals_bytes < made.peak_host <= host


@given(problems(), st.sampled_from(["host_memory", "device_memory"]), st.sampled_from(["auto", "cqs", "strips"]))
@settings(max_examples=15)
def test_the_smallest_budget_of_a_survey_is_named(problem: Problem, name: str, decomposition: str) -> None:
    check_the_smallest_budget(surveyed(problem), SURVEYING, name, decomposition)


def test_the_smallest_budget_is_named_where_smaller_tiles_take_more_scratch() -> None:
    problem = a_problem(778_024, query_heads=8, head_dim=256, causal=False)
    gpu = replace(GPU, kernel="flash", scratch_bytes=get_kernel("flash").scratch_bytes)
    check_the_smallest_budget(problem, gpu, "device_memory", "auto")


@given(problems(), gpus, st.sampled_from([1, 7, 31]), st.sampled_from(["cqs", "strips"]))
@settings(max_examples=40)
def test_tiles_shrink_with_the_budget(problem: Problem, gpu: Hardware, chunks: int, decomposition: str) -> None:
    """Of one division: another may have larger chunks, and with them larger tiles."""
    options: dict[str, Any] = {"chunks": min(chunks, problem.keys), "decomposition": decomposition}
    largest = None
    for power in range(40, 20, -1):
        try:
            tiles = plan(problem, gpu, device_memory=1 << power, host_memory=1 << 60, **options).tiles
        except BudgetError:
            break
        if largest:
            assert tiles.query <= largest.query
            assert tiles.key <= largest.key
        largest = tiles
    assert largest is not None


@pytest.mark.parametrize(
    ("tokens", "head_dim", "out_dtype", "chunks"),
    [
        (1 << 20, 64, "float16", 1),
        (1 << 20, 64, "float16", 7),
        (1 << 20, 128, "float32", 13),
        (1 << 24, 64, "float16", 1),
        (10_000_019, 64, "float16", 7),
        *ODD_CHUNKS,
    ],
)
def test_a_long_chunk_is_key_tiles_of_one_size(tokens: int, head_dim: int, out_dtype: str, chunks: int) -> None:
    """Every other size is another shape, for which a library makes another plan."""
    problem = a_problem(tokens, head_dim=head_dim, out_dtype=out_dtype)
    made = plan(problem, GPU, chunks=chunks, decomposition="cqs")
    assert made.chunk_rows % made.tiles.key == 0
    assert made.tiles.key % 128 == 0
    assert made.tiles.key > 32_768


@pytest.mark.parametrize("lanes", [1, 4])
def test_sixteen_million_tokens_in_two_and_sixteen_gibibytes(lanes: int) -> None:
    problem = a_problem(16_000_000)
    made = plan(problem, replace(GPU, lanes=lanes), chunks=7, device_memory=2 * GIB * lanes, host_memory=16 * GIB * lanes)
    assert (made.chunks, made.decomposition) == (7, "cqs" if lanes == 1 else "strips")  # lanes share one head group
    assert made.tiles.query >= 65_536
    assert made.tiles.key > 60_000
    assert made.peak_device <= 2 * GIB * lanes
    assert made.peak_host <= 16 * GIB * lanes
    assert made.binds == "compute"
    assert f"tiles of {made.tiles.query:,} queries by {made.tiles.key:,} keys" in str(made)


@pytest.mark.parametrize("read_rate", [1e9, 8e9])
@pytest.mark.parametrize("lanes", [2, 3, 8])
def test_lanes_share_one_head(lanes: int, read_rate: float) -> None:
    """In their own memory: partials on disk, which are predicted to be as fast, take it to be as fast as is assumed."""
    problem = a_problem(1 << 24)
    budgets = {"device_memory": 2 * GIB * lanes, "host_memory": 32 * GIB}
    one, made = (plan(problem, replace(GPU, lanes=count, read_rate=read_rate), **budgets) for count in (1, lanes))
    assert (made.decomposition, made.partials) == ("strips", "memory")
    seconds = [next(link.seconds for link in each.links if link.name == "compute") for each in (one, made)]
    assert seconds[1] <= 1.05 * seconds[0] / lanes


@given(problems(), st.sampled_from([1, 7, 13]), st.integers(28, 33))
@settings(max_examples=20)
def test_lanes_share_the_budgets(problem: Problem, chunks: int, power: int) -> None:
    """Four lanes with four times the memory do what one does with its own."""
    options: dict[str, Any] = {"chunks": min(chunks, problem.keys), "decomposition": "strips"}
    try:
        one = plan(problem, GPU, device_memory=1 << power, **options)
    except BudgetError:
        with pytest.raises(BudgetError):
            plan(problem, replace(GPU, lanes=4), device_memory=4 << power, **options)
        return
    four = plan(problem, replace(GPU, lanes=4), device_memory=4 << power, **options)
    assert (four.span == one.span) <= (four.tiles == one.tiles)
    assert four.peak_device <= 4 << power
    if (four.span, four.partials) == (one.span, one.partials):
        assert four.peak_device == 4 * one.peak_device
    assert "4 GPUs" in str(four)


def test_what_measuring_took_counts() -> None:
    problem = a_problem(1 << 20)
    made = plan(problem, replace(GPU, measuring_bytes=5 * GIB), device_memory=6 * GIB)
    assert made.peak_device == 5 * GIB
    with pytest.raises(BudgetError) as refused:
        plan(problem, replace(GPU, measuring_bytes=5 * GIB), device_memory=4 * GIB)
    assert smallest_named(refused.value) == ("device_memory", 5 * GIB)


def test_copies_are_a_link_and_may_bind() -> None:
    problem = a_problem(1 << 20)
    slow = plan(problem, replace(GPU, copy_rate=1e6))
    link = next(link for link in slow.links if link.name == "copy")
    least = 4 * (1 << 20) * 64 * 2  # q, k, v once to the device and something back
    assert link.amount >= least
    assert slow.seconds >= link.seconds == pytest.approx(link.amount / 1e6)
    assert all(link.name != "copy" for link in plan(problem).links)


@pytest.mark.parametrize(("heads", "lanes", "spare"), [(1, 1, False), (2, 1, True), (4, 4, False), (5, 4, True)])
def test_accumulators_for_the_next_head_group_only_where_there_is_one(heads: int, lanes: int, spare: bool) -> None:
    problem = a_problem(1 << 20, query_heads=heads, kv_heads=heads, head_dim=64, dtype="float16", causal=True)
    budgets = {"device_memory": lanes * GIB, "host_memory": 256 * GIB}
    made = plan(problem, replace(GPU, lanes=lanes), chunks=7, decomposition="cqs", **budgets)
    assert made.accumulators == (13 if spare else 7)
