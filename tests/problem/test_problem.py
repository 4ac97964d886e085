"""A problem is made of three shapes, or refused by name with what was found and what was expected."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from support import a_problem

from oocattn import ProblemError
from oocattn.problem.problem import ArraySpec, HeadGroup, Problem, make_problem, read_problem

Q, KV = (2, 6, 100, 64), (2, 3, 100, 64)


def problem(q=Q, k=KV, v=KV, dtypes=("float16",) * 3, **options) -> Problem:
    specs = (ArraySpec(name, shape, dtype) for name, shape, dtype in zip("qkv", (q, k, v), dtypes, strict=True))
    return make_problem(*specs, **options)


def test_shapes_and_defaults() -> None:
    made = problem()
    assert made == Problem(2, 6, 3, 100, 64, "float16", "float16", False, 0.125)
    assert problem(causal=True, scale=0.5, out_dtype="float32") == Problem(2, 6, 3, 100, 64, "float16", "float32", True, 0.5)
    assert (made.group_size, made.head_groups, made.itemsize) == (2, 6, 2)


def test_three_dimensions_are_a_batch_of_one() -> None:
    assert problem(Q[1:], KV[1:], KV[1:]) == problem((1, *Q[1:]), (1, *KV[1:]), (1, *KV[1:]))


def test_head_groups_share_their_keys() -> None:
    groups = [problem().head_group(index) for index in range(6)]
    assert groups[0] == HeadGroup(0, 0, range(0, 2))
    assert groups[4] == HeadGroup(1, 1, range(2, 4))
    heads = {(group.batch, head): group.kv_head for group in groups for head in group.query_heads}
    assert heads == {(batch, head): head // 2 for batch in range(2) for head in range(6)}


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_pairs_and_operations_are_counted(tokens: int) -> None:
    causal, full = (a_problem(tokens, batch=2, query_heads=3, causal=causal) for causal in (True, False))
    assert full.pairs == 6 * tokens * tokens
    assert causal.pairs == 6 * sum(range(1, tokens + 1))
    assert causal.flops == 4 * 64 * causal.pairs


def test_bytes_of_a_partial() -> None:
    # num [g, n, D], den and max [g, n] in float32, keys [n] in int64
    assert a_problem(100, query_heads=3, kv_heads=1, head_dim=64).state_bytes(10) == 3 * 10 * 66 * 4 + 10 * 16


REFUSED = {
    "rank": ({"q": (100, 64)}, r"array 'q' has shape \[100, 64\]: expected \[B, H, N, D\]"),
    "rank of k": ({"k": (1, 2, 3, 100, 64)}, r"array 'k' has shape \[1, 2, 3, 100, 64\]: expected"),
    "batch": ({"k": (1, 3, 100, 64), "v": (1, 3, 100, 64)}, r"array 'k' .* expected \[2, 3, 100, 64\]"),
    "fewer queries": (
        {"q": (1, 2, 100, 64), "k": (1, 2, 128, 64), "v": (1, 2, 128, 64)},
        r"'k' has shape \[1, 2, 128, 64\]: expected 100 tokens, as 'q' has \(q \[1, 2, 100, 64\], .*\), for queries and "
        r"keys must be equally many for now; give queries for all keys.*--layout",
    ),
    "tokens of k": ({"k": (2, 3, 99, 64)}, r"'k' has .*\(q \[2, 6, 100, 64\], k \[2, 3, 99, 64\], v \[2, 3, 100, 64\]\)"),
    "batch of three dimensions": ({"k": (3, 100, 64), "v": (3, 100, 64)}, r"'k' has .* expected \[2, 3, 100, 64\]"),
    "no batch": (
        {"q": (6, 100, 64), "k": (3, 100, 32), "v": (3, 100, 64)},
        r"'k' has shape \[3, 100, 32\]: expected \[3, 100, 64\], with the batch size and head dimension of q \(q \[6, 100",
    ),
    "no keys": ({"k": (2, 3, 0, 64), "v": (2, 3, 0, 64)}, r"'k' is empty: .* found \[2, 3, 0, 64\]"),
    "no values": ({"v": (2, 3, 100, 0)}, r"'v' is empty: .* found \[2, 3, 100, 0\]"),
    "tokens of v": ({"v": (2, 3, 99, 64)}, r"array 'v' has shape \[2, 3, 99, 64\]: expected \[2, 3, 100, 64\]"),
    "head dimension": ({"k": (2, 3, 100, 32)}, r"array 'k' .* expected \[2, 3, 100, 64\]"),
    "heads of v": ({"v": (2, 6, 100, 64)}, r"array 'v' .* expected \[2, 3, 100, 64\]"),
    "multiple": ({"k": (2, 4, 100, 64), "v": (2, 4, 100, 64)}, r"q has 6 heads and k has 4: .* multiple"),
    "no tokens": ({"q": (2, 6, 0, 64)}, "'q' is empty"),
    "no KV heads": ({"k": (2, 0, 100, 64), "v": (2, 0, 100, 64)}, "'k' is empty"),
    "float64": ({"dtypes": ("float64",) * 3}, "array 'q' has dtype float64: expected one of float16, bfloat16, float32"),
    "integers": ({"dtypes": ("float16", "int8", "float16")}, "array 'k' has dtype int8: expected one of"),
    "mixed": ({"dtypes": ("float16", "float16", "float32")}, "array 'v' has dtype float32: expected float16"),
    "wide": ({"q": (2, 6, 9, 257), "k": (2, 3, 9, 257), "v": (2, 3, 9, 257)}, "257 of q is larger than 256"),
    "output": ({"out_dtype": "float64"}, r"out_dtype = 'float64' \(str\): expected one of float16, bfloat16, float32"),
    "scale zero": ({"scale": 0.0}, r"scale = 0.0 \(float\): expected a positive finite number"),
    "scale negative": ({"scale": -1.0}, "positive finite"),
    "scale NaN": ({"scale": math.nan}, "positive finite"),
    "scale Inf": ({"scale": math.inf}, "positive finite"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_problem_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        problem(**options)


def test_words() -> None:
    assert str(problem(causal=True, out_dtype="float32")) == (
        "2 x 6/3 heads x 100 tokens x D = 64, float16 to float32, causal"
    )
    assert str(a_problem(1 << 20, causal=False)) == "1 head x 1,048,576 tokens x D = 64, float16, full"


def test_a_problem_is_read_back_from_json() -> None:
    made = problem(causal=True, scale=0.3, out_dtype="float32")
    assert read_problem(json.loads(json.dumps(asdict(made)))) == made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("batch", "query_heads", "kv_heads", "tokens", "head_dim") for value in (0, True, 1.0)),
        ("tokens", -1),
        ("tokens", 1 << 63),
        ("tokens", 1 << 56),  # 2^56 x 12 x 64 elements
        ("head_dim", 257),
        ("kv_heads", 4),
        ("dtype", "float64"),
        ("out_dtype", None),
        ("causal", 1),
        ("scale", 0.0),
        ("scale", -1.0),
        ("scale", "nan"),
        ("scale", "inf"),
        ("scale", "1"),
        ("surprise", 1),
    ],
)
def test_json_of_no_valid_problem_is_refused(name: str, value: object) -> None:
    with pytest.raises(
        ValueError,
        match=f"{name}|{name.replace('_', ' ')}|2\\^63 elements|multiple of the KV heads|output dtype|input dtype",
    ):
        read_problem({**asdict(problem()), name: value})


@pytest.mark.parametrize("content", [None, 7, [], {}, {"batch": 1}])
def test_what_is_no_problem_at_all_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_problem(content)
