"""Problems, machines and budgets that are made up, and plans for them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support import GENEROUS, MACHINE, a_problem

from oocattn import BudgetError, Plan
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import Hardware, InputCost
from oocattn.problem.calls import CallSize
from oocattn.problem.given import GivenArrays
from oocattn.problem.problem import Problem

MIB = 1 << 20


def plan(problem: Problem, hardware: Hardware = MACHINE, **options: Any) -> Plan:
    return make_plan(problem, hardware, **{"device_memory": GENEROUS, "host_memory": GENEROUS, **options})


def smallest_named(error: BudgetError) -> tuple[str, int]:
    """The budget that the message is about, and the smallest that it says works."""
    match = re.search(r"(device|host)_memory .* the smallest that works is (\d+)MiB", str(error))
    assert match, str(error)
    return f"{match[1]}_memory", int(match[2]) * MIB


def check_the_smallest_budget(problem: Problem, hardware: Hardware, name: str, decomposition: str) -> None:
    """The budget that a refusal names works, and one mebibyte less does not."""
    options: dict[str, Any] = {"decomposition": decomposition, "checkpoint_seconds": 60.0 if hardware.scratch_disk else 0.0}
    with pytest.raises(BudgetError) as refused:
        plan(problem, hardware, **options, **{name: 1})
    named, smallest = smallest_named(refused.value)
    assert named == name
    assert getattr(plan(problem, hardware, **options, **{name: smallest}), f"peak_{name[:-7]}") <= smallest
    with pytest.raises(BudgetError):
        plan(problem, hardware, **options, **{name: smallest - MIB})


def _windows(longest: int) -> st.SearchStrategy[tuple[int | None, int | None]]:
    side = st.one_of(st.none(), st.integers(0, longest))
    return st.tuples(side, side)


@st.composite
def asked(draw: st.DrawFn, query_heads: int, queries: int, keys: int) -> dict[str, Any]:
    """Fields of a problem that are not of its shape: mask, terms of the score, the rows that are asked for."""
    causal, window = draw(st.booleans()), draw(st.one_of(st.just((None, None)), _windows(max(queries, keys))))
    found: dict[str, Any] = {"causal": causal, "window_size": (window[0], None if causal else window[1])}
    if found["window_size"] != (None, None):
        found["sink_tokens"] = draw(st.integers(0, 5))
    if draw(st.integers(0, 3)) == 0:
        documents = draw(st.integers(1, 30))
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        edges = [np.sort(random.integers(0, end + 1, documents + 1)) for end in (queries, keys)]
        for of, end in zip(edges, (queries, keys), strict=True):
            of[[0, -1]] = 0, end
        found["given"] = GivenArrays(cu_seqlens_q=edges[0], cu_seqlens_k=edges[1])
        found["digests"] = found["given"].digests
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, queries - 1))
        found["rows_asked"] = start, draw(st.integers(start + 1, queries))
    return {**found, "bias_heads": draw(st.sampled_from([0, 0, 1, query_heads]))}


_tokens = st.one_of(st.integers(1, 1000), st.integers(1, 1 << 21), st.sampled_from([1, 1 << 20, 999_983]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem: half of them square and plain, half with all that may be asked."""
    kv_heads = draw(st.integers(1, 8))
    query_heads = kv_heads * draw(st.sampled_from([1, 2, 7]))
    queries = keys = draw(_tokens)
    dtype, out_dtype = (draw(st.sampled_from(["float16", "bfloat16", "float32"])) for _ in range(2))
    more: dict[str, Any] = {"head_dim": draw(st.integers(1, 256)), "causal": draw(st.booleans())}
    if draw(st.booleans()):
        keys = draw(st.one_of(st.just(queries), _tokens))
        more |= {"keys": keys, "value_dim": draw(st.integers(1, 256)), **draw(asked(query_heads, queries, keys))}
    heads = {"batch": draw(st.integers(1, 3)), "query_heads": query_heads, "kv_heads": kv_heads}
    return a_problem(queries, dtype=dtype, out_dtype=out_dtype, **heads, **more)


def scratch_of_rows(size: CallSize) -> int:
    return 4 * (size.group_size * size.rows + min(size.keys, 8192)) * max(size.head_dim, size.value_dim)


machines = st.builds(
    Hardware,
    kernel=st.just("cpu"),
    kernel_flops=st.floats(1e9, 1e15),
    scratch_bytes=st.just(scratch_of_rows),
    lanes=st.integers(1, 8),
    read_rate=st.floats(1e7, 1e11),
    write_rate=st.floats(1e7, 1e11),
    scratch_disk=st.sampled_from([0, 1 << 34, 1 << 60]),
)
inputs = st.builds(
    InputCost,
    decode_bytes=st.sampled_from([0, 1 << 27]),
    align_rows=st.sampled_from([1, 1000, 65536]),
    shared_heads=st.sampled_from([{}, {"k": 2}, {"q": 8, "k": 4, "v": 4}]),
    packed=st.booleans(),
)
budgets = st.integers(20, 40).map(lambda power: 1 << power)
