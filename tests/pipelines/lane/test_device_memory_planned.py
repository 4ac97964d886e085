"""A lane on a GPU takes no more of its memory than is planned, whatever is asked: in the model of `device_memory`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, a_problem, replanned, with_partials

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from device_memory import MIB, SizedLane, a_gpu_of_sizes, measured

from oocattn import BudgetError, Plan
from oocattn.kernels.registry import get_kernel
from oocattn.pipelines.questions import Questions
from oocattn.planning.candidates import make_plan
from oocattn.planning.memory import Tiles
from oocattn.problem.given import GivenArrays
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import ARRAYS, SecondPass

GIB = 1 << 30
SOME = 3
"""Subproblems at each end of a head group that are computed."""


def surveyed(problem: Problem, **asked: Any) -> Problem:
    """The survey of a result."""
    return replace(problem, out_dtype="float32", second_pass=SecondPass(reduced=Questions(**asked).reduced(problem)))


def check(plan: Plan) -> None:
    """Compute some subproblems of the first and the last head group."""
    with a_gpu_of_sizes() as allocator:
        lane = SizedLane(plan)
        for head_group in {0, plan.problem.head_groups - 1}:
            indices = plan.division_of(head_group).indices
            for index in dict.fromkeys([*indices[:SOME], *indices[-SOME:]]):
                lane.attend(head_group, index)
        assert allocator.most_reserved <= plan.peak_device


def plan_of(problem: Problem, kernel: str, device_memory: int = 8 * GIB, partials: str = "memory", **options: Any) -> Plan:
    gpu = replace(GPU, kernel=kernel, scratch_bytes=get_kernel(kernel).scratch_bytes)
    made = make_plan(problem, gpu, device_memory=device_memory, host_memory=64 * GIB, **options)
    return made if made.decomposition == "strips" else with_partials(made, partials)


def check_division(problem: Problem, kernel: str, division: tuple[str, int, str], device_memory: int) -> None:
    """Compute some of it in a division, where the memory has room for any tile."""
    decomposition, chunks, partials = division
    options: dict[str, Any] = {"decomposition": decomposition, "partials": partials}
    options["chunks"] = min(chunks, max(problem.out_rows, problem.keys))
    try:
        plan = plan_of(problem, kernel, device_memory, **options)
    except BudgetError:
        return
    check(plan)


MASKS = st.sampled_from(["causal", "full", "window", "documents", "used"])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Of all kinds of masks, of some rows and heads of them."""
    dtype, kind = draw(st.sampled_from(["float16", "bfloat16", "float32"])), draw(MASKS)
    kv_heads, group_size = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 8)]))
    queries = draw(st.integers(1, 40_000))
    keys = draw(st.sampled_from([queries, draw(st.integers(1, 40_000))]))
    start = draw(st.sampled_from([0, draw(st.integers(0, queries - 1))]))
    stop = draw(st.sampled_from([queries, draw(st.integers(start + 1, queries))]))
    asked: dict[str, Any] = {"causal": kind == "causal" or draw(st.booleans())}
    asked["softcap"] = draw(st.sampled_from([None, 20.0]))
    if kind == "window":
        asked |= {"window_size": (draw(st.integers(0, 9000)), 0), "sink_tokens": draw(st.integers(0, 9))}
    given_arrays = GivenArrays()
    if kind == "documents":
        queries_of, keys_of = (np.array([0, draw(st.integers(0, size)), size]) for size in (queries, keys))
        given_arrays = GivenArrays(cu_seqlens_q=queries_of, cu_seqlens_k=keys_of)
    elif kind == "used":
        given_arrays = GivenArrays(seqused_k=np.array([keys // 2, keys]))
    heads = draw(st.sampled_from([None, (0, kv_heads * group_size - 1)])) if kv_heads > 1 else None
    return a_problem(
        queries,
        batch=2,
        query_heads=kv_heads * group_size,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 40, 64, 128])),
        keys=keys,
        dtype=dtype,
        rows_asked=(start, stop),
        heads=heads,
        given=given_arrays,
        digests=given_arrays.digests,
        **asked,
    )


arrays = st.lists(st.sampled_from(ARRAYS), min_size=1, unique=True).map(lambda names: tuple(sorted(names)))
questions = st.fixed_dictionaries({"arrays": arrays, "top": st.integers(1, 128), "pools": st.integers(1, 4096)})
divisions = st.tuples(st.sampled_from(["cqs", "strips"]), st.integers(1, 13), st.sampled_from(["memory", "disk"]))


@given(problems(), questions, divisions, st.integers(26, 36))
@settings(max_examples=60, deadline=None)
def test_a_survey_takes_what_is_planned(
    problem: Problem, asked: dict[str, Any], division: tuple[str, int, str], power: int
) -> None:
    check_division(surveyed(problem, **asked), "hopper-survey", division, 1 << power)


@pytest.mark.parametrize("arrays", [ARRAYS, ("received",), ("pooled",), ("top_keys",), ("entropy",)], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 7, 13])
def test_a_causal_survey_in_any_number_of_chunks_takes_what_is_planned(chunks: int, arrays: tuple[str, ...]) -> None:
    """Of 3, 7 and 13 a quorum's highest chunk stages keys only where it owns its diagonal: then they are the most."""
    problem = surveyed(a_problem(40_961, query_heads=2, kv_heads=1, head_dim=128), arrays=arrays, pools=1000)
    check(plan_of(problem, "hopper-survey", chunks=chunks, decomposition="cqs"))


@given(problems(), st.sampled_from(["hopper", "hopper-precise", "hopper-weights"]), divisions, st.integers(26, 36))
@settings(max_examples=30, deadline=None)
def test_a_run_and_a_proof_take_what_is_planned(
    problem: Problem, kernel: str, division: tuple[str, int, str], power: int
) -> None:
    if kernel == "hopper-weights":
        problem = replace(problem, out_dtype="float32", second_pass=SecondPass(7))
    check_division(problem, kernel, division, 1 << power)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("tokens", "pools"), [(1000, 1024), (5000, 700), (1 << 15, 4096), (1 << 20, 4096)])
def test_timing_a_kernel_for_a_survey_takes_what_is_planned_and_little(tokens: int, pools: int, dtype: str) -> None:
    """Also where the rows and keys that are timed have many times as many pools as those of the problem."""
    problem = a_problem(tokens, query_heads=8, kv_heads=1, head_dim=72, dtype=dtype)
    for top in (1, 64, 128):
        found, planned = measured("hopper-survey", surveyed(problem, top=top, pools=pools))
        assert found <= planned < 200 * MIB
    found, planned = measured("hopper", problem)
    assert found <= planned < 200 * MIB


@pytest.mark.parametrize("kernel", ["hopper", "hopper-survey"])
def test_last_tiles_whose_tensors_are_small_are_planned(kernel: str) -> None:
    """The parts of their float32 numbers have less than 1 MiB each: torch takes them apart from those of large tiles."""
    problem = a_problem(2 * 32_768 + 1900, head_dim=128, dtype="float32")
    plan = plan_of(surveyed(problem) if kernel == "hopper-survey" else problem, kernel, chunks=1, decomposition="cqs")
    check(replanned(plan, tiles=Tiles(32_768, 32_768)))
