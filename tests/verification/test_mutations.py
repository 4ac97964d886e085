"""A result of another problem is found by recomputed rows: one key too few, a term forgotten, or another head's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from in_memory import dataset_of, problem_of
from reference import attention_by_definition
from support import normal_arrays, numpy_type

from oocattn.verification.recompute import compare_row, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF

TOKENS, HEADS = 1000, 2
DOCUMENTS = [0, 300, 300, 650, 1000]
SLOPES, SINKS = [2.0**-7, 2.0**-3], [0.0, 2.0]
WINDOW = {"causal": True, "window_size": (256, 0)}

MUTATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a key of the window is dropped": (WINDOW, {"window_size": (255, 0)}),
    "a key before the window is attended": (WINDOW, {"window_size": (257, 0)}),
    "a key after the window is dropped": ({"window_size": (300, 40)}, {"window_size": (300, 39)}),
    "a sink is dropped": ({**WINDOW, "sink_tokens": 4}, {"sink_tokens": 3}),
    "a key of the prefix is dropped": ({"causal": True, "prefix": 250}, {"prefix": 249}),
    "a boundary is one off": ({"cu_seqlens_q": DOCUMENTS}, {"cu_seqlens_q": [0, 300, 300, 651, 1000]}),
    "a boundary is one off, causal": (
        {"causal": True, "cu_seqlens_q": DOCUMENTS},
        {"cu_seqlens_q": [0, 301, 301, 650, 1000]},
    ),
    "documents are ignored": ({"causal": True, "cu_seqlens_q": DOCUMENTS}, {"cu_seqlens_q": None}),
    "a used key is dropped": ({"seqused_k": [750]}, {"seqused_k": [749]}),
    "unused keys move the diagonal": ({"causal": True, "seqused_k": [750]}, {"seqused_k": [751]}),
    "softcap is ignored": ({"causal": True, "softcap": 30.0}, {"softcap": None}),
    "a slope has the wrong sign": ({"causal": True, "alibi_slopes": SLOPES}, {"alibi_slopes": [SLOPES[0], -SLOPES[1]]}),
    "slopes are another head's": ({"causal": True, "alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES[::-1]}),
    "the bias is another head's": ({"causal": True, "key_bias": True}, {}),
    "the learnable sink is forgotten": ({"causal": True, "learnable_sink": SINKS}, {"learnable_sink": None}),
    "the learnable sink is another head's": ({"causal": True, "learnable_sink": SINKS}, {"learnable_sink": SINKS[::-1]}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_mask_or_term_is_found(mutation: str) -> None:
    """With the largest allowance: for weights that are rounded to bfloat16, as matrix units take them."""
    (right, wrong), dtype = MUTATIONS[mutation], "bfloat16"
    arrays = normal_arrays(TOKENS, heads=HEADS, head_dim=64, dtype=dtype)
    bias = np.random.default_rng(1).standard_normal((1, HEADS, TOKENS), np.float32) if "key_bias" in right else None
    problem = problem_of(arrays, bias, **right)
    options = {"borders": range(125, TOKENS, 125), "rows": 64, "seed": 0, "weight_roundoff": UNIT_ROUNDOFF[dtype]}
    exact = list(recompute_rows(problem, dataset_of(arrays, bias), **options))
    asked = {name: value for name, value in {**right, **wrong}.items() if name != "key_bias"}
    out, lse = attention_by_definition(*arrays, **asked, key_bias=None if bias is None else bias[:, ::-1])
    out, lse = out.astype(numpy_type(dtype)).astype(np.float64), lse.astype(np.float32)
    found = [
        compare_row(problem, row, out[row.batch, row.head, row.token], lse[row.batch, row.head, row.token]) for row in exact
    ]
    assert sum(not row.passed for row in found) >= 10
    assert all(row.shows for row in found)
    for row in exact:
        rounded = row.out.astype(numpy_type(dtype)).astype(np.float64)
        assert compare_row(problem, row, rounded, float(np.float32(row.lse))).passed
