"""Masks of every kind, the same as dense matrices, and plans of few chunks with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import mask_by_definition
from support import GENEROUS, MACHINE, a_problem

from oocattn import Plan
from oocattn.planning.candidates import make_plan
from oocattn.problem.given import GivenArrays

KINDS = ("full", "causal", "window", "sinks", "documents", "used", "prefix", "anything")


def _edges(draw: st.DrawFn, end: int, documents: int) -> list[int]:
    inner = draw(st.lists(st.integers(0, end), min_size=documents - 1, max_size=documents - 1))
    return [0, *sorted(inner), end]


@st.composite
def asked_of(draw: st.DrawFn, kind: str, queries: int, keys: int) -> dict[str, Any]:
    """What a caller asks of a mask of some kind."""
    most = max(queries, keys)
    any_kind = kind == "anything"
    found: dict[str, Any] = {"causal": kind in ("causal", "prefix") or (kind != "full" and draw(st.booleans()))}
    if kind in ("window", "sinks") or (any_kind and draw(st.booleans())):
        side = st.one_of(st.integers(0, 9), st.integers(0, most), st.none())
        found["window_size"] = draw(st.integers(0, 9)), None if found["causal"] else draw(side)
    if kind == "sinks" or (any_kind and "window_size" in found):
        found["sink_tokens"] = draw(st.integers(1, 6))
    if kind == "prefix" or (any_kind and (found["causal"] or "window_size" in found) and draw(st.booleans())):
        found["prefix"] = draw(st.integers(1, most))
    if kind == "documents" or (any_kind and draw(st.booleans())):
        documents = draw(st.integers(1, 8))
        found["cu_seqlens_q"] = edges = _edges(draw, queries, documents)
        found["cu_seqlens_k"] = edges if queries == keys and draw(st.booleans()) else _edges(draw, keys, documents)
    elif kind == "used" or (any_kind and draw(st.booleans())):
        found["seqused_k"] = draw(st.lists(st.integers(0, keys), min_size=2, max_size=2))
    return found


@st.composite
def plans(draw: st.DrawFn, most: int = 90, kinds: tuple[str, ...] = KINDS) -> tuple[Plan, NDArray[np.bool_]]:
    """A plan of few chunks, and the pairs that are attended: [B, queries, keys]."""
    queries = draw(st.integers(1, most))
    keys = draw(st.one_of(st.just(queries), st.integers(1, most)))
    asked = draw(asked_of(draw(st.sampled_from(kinds)), queries, keys))
    matrix, _ = mask_by_definition(2, queries, keys, **asked)
    arrays = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    given = GivenArrays(**{name: np.array(asked.pop(name), np.int64) for name in arrays if name in asked})
    start = draw(st.sampled_from([0, 0, draw(st.integers(0, queries - 1))]))
    stop = draw(st.sampled_from([queries, queries, draw(st.integers(start + 1, queries))]))
    heads = {"batch": 2, "query_heads": 2, "kv_heads": 1, "head_dim": 4, "dtype": "float32"}
    problem = a_problem(
        queries,
        keys=keys,
        rows_asked=(start, stop),
        given=given,
        digests=given.digests,
        **heads,
        **{"causal": False, **asked},
    )
    chunks = draw(st.integers(1, min(13, max(stop - start, keys))))
    options = {"chunks": chunks, "decomposition": draw(st.sampled_from(["auto", "cqs", "strips"]))}
    try:
        plan = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, **options)
    finally:
        matrix[:, :start] = matrix[:, stop:] = False
    return plan, matrix
