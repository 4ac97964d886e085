"""A problem is made of three shapes, or refused by name with what was found and what was expected."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support import a_problem, problem_options

from oocattn import ProblemError
from oocattn.problem.arrays import ArraySpec
from oocattn.problem.given import GivenArrays
from oocattn.problem.problem import HeadGroup, Problem, make_problem, read_problem
from oocattn.records import to_json

Q, KV = (2, 6, 100, 64), (2, 3, 100, 64)


def problem(q=Q, k=KV, v=KV, dtypes=("float16",) * 3, bias=None, bias_dtype="float32", **asked) -> Problem:
    """The problem of arrays of these shapes, and of a key_bias where there is one."""
    specs = [ArraySpec(name, shape, dtype) for name, shape, dtype in zip("qkv", (q, k, v), dtypes, strict=True)]
    key_bias = None if bias is None else ArraySpec("key_bias", bias, bias_dtype)
    return make_problem(*specs, problem_options(**asked), key_bias)


def test_shapes_and_defaults() -> None:
    made = problem()
    assert made == Problem(2, 6, 3, 100, 100, 64, 64, "float16", "float16", 0.125, (0, 100))
    changed = problem(causal=True, scale=0.5, out_dtype="float32")
    assert (changed.causal, changed.scale, changed.out_dtype) == (True, 0.5, "float32")
    assert (made.group_size, made.head_groups, made.itemsize, made.out_heads, made.out_rows) == (2, 6, 2, 6, 100)


def test_queries_keys_and_values_have_sizes_of_their_own() -> None:
    made = problem((1, 4, 10, 64), (1, 2, 300, 64), (1, 2, 300, 48), causal=True)
    assert (made.queries, made.keys, made.head_dim, made.value_dim) == (10, 300, 64, 48)
    assert made.out_shape == (1, 4, 10, 48)
    assert made.pairs == 4 * sum(range(291, 301))
    assert made.flops == 2 * (64 + 48) * made.pairs
    assert made.kv_row_bytes == (64 + 48) * 2
    assert str(made) == "4/2 heads x 10 queries, 300 keys x D = 64, Dv = 48, float16, causal"


def test_rows_and_heads_that_are_asked_for_are_those_of_the_result() -> None:
    made = problem(queries=(90, 100), heads=(1, 4, 5))
    assert made.out_shape == (2, 3, 10, 64)
    assert made.pairs == 2 * 3 * 10 * 100
    assert [(group.batch, group.kv_head, group.query_heads, group.outputs) for group in map(made.head_group, range(4))] == [
        (0, 0, (1,), range(1)),
        (0, 2, (4, 5), range(1, 3)),
        (1, 0, (1,), range(1)),
        (1, 2, (4, 5), range(1, 3)),
    ]
    assert str(made).endswith("full, queries 90 to 100, 3 of the heads")


def test_with_causal_a_window_has_nothing_after() -> None:
    made = problem(causal=True, window_size=(9, 5))
    assert made == problem(causal=True, window_size=(9, None))
    assert made.mask().key_ranges(50)[1] == range(41, 51)


def test_batch_entries_have_masks_by_their_keys() -> None:
    made = problem(seqused_k=[40, 100], causal=True)
    assert [made.mask(batch).keys for batch in range(2)] == [40, 100]
    assert made.pairs == 6 * (sum(range(41)) + sum(range(101)))
    assert "40 to 100 keys used" in str(made)
    same = problem(seqused_k=[40, 40])
    assert same.mask(0) is same.mask(1)
    assert [*same.masks.values()] == [2]


def test_documents_have_boundaries_among_queries_and_keys() -> None:
    made = problem(cu_seqlens_q=[0, 10, 10, 100], cu_seqlens_k=[0, 50, 60, 100])
    assert made.pairs == 12 * (10 * 50 + 90 * 40)
    assert problem(cu_seqlens_q=[0, 30, 100]).pairs == 12 * (30 * 30 + 70 * 70)
    assert str(made).endswith("3 documents")


def test_slopes_and_sinks_are_those_of_a_groups_heads() -> None:
    of_heads, of_entries = np.arange(6), np.arange(12).reshape(2, 6)
    made = problem(alibi_slopes=of_entries, learnable_sink=of_heads, heads=(1, 4, 5))
    assert [made.slopes(made.head_group(index)) for index in range(4)] == [(1,), (4, 5), (7,), (10, 11)]
    assert [made.sinks(made.head_group(index)) for index in range(4)] == [(1,), (4, 5), (1,), (4, 5)]
    assert problem().slopes(problem().head_group(0)) is problem().sinks(problem().head_group(0)) is None
    assert not made.is_plain
    assert problem(learnable_sink=of_heads).is_plain  # merged at the end: no term of a score
    assert not problem(softcap=3.0).is_plain


@pytest.mark.parametrize(("shape", "heads"), [((2, 1, 100), 1), ((2, 6, 100), 6)])
def test_a_key_bias_is_used_unless_it_is_refused(shape: tuple[int, ...], heads: int) -> None:
    made = problem(bias=shape)
    assert (made.bias_heads, made.is_plain) == (heads, False)
    assert made.kv_row_bytes == problem().kv_row_bytes + 4 * min(heads, 2)
    assert "key bias" in str(made)
    assert problem(bias=shape, key_bias=False) == problem()


def test_three_dimensions_are_a_batch_of_one() -> None:
    assert problem(Q[1:], KV[1:], KV[1:]) == problem((1, *Q[1:]), (1, *KV[1:]), (1, *KV[1:]))


def test_head_groups_share_their_keys() -> None:
    groups = [problem().head_group(index) for index in range(6)]
    assert groups[0] == HeadGroup(0, 0, (0, 1), range(0, 2))
    assert groups[4] == HeadGroup(1, 1, (2, 3), range(2, 4))
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
    "tokens of k": (
        {"k": (2, 3, 99, 64)},
        r"'v' has .* expected \[2, 3, 99, 64\].*\(q \[2, 6, 100, 64\], k \[2, 3, 99, 64\], v \[2, 3, 100, 64\]\)",
    ),
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
    "wide": ({"q": (2, 6, 9, 1025), "k": (2, 3, 9, 1025), "v": (2, 3, 9, 64)}, "1025 of q is larger than 1024"),
    "wide values": ({"v": (2, 3, 100, 1025)}, "1025 of v is larger than 1024"),
    "output": ({"out_dtype": "float64"}, "out_dtype = 'float64': expected one of float16, bfloat16, float32"),
    "scale zero": ({"scale": 0.0}, "scale = 0.0: expected a positive finite number"),
    "scale negative": ({"scale": -1.0}, "positive finite"),
    "scale NaN": ({"scale": math.nan}, "positive finite"),
    "scale Inf": ({"scale": math.inf}, "positive finite"),
    "softcap zero": ({"softcap": 0.0}, "softcap = 0.0: expected a positive finite number"),
    "softcap NaN": ({"softcap": math.nan}, "softcap"),
    "sinks without a window": ({"sink_tokens": 4, "causal": True}, "sink_tokens = 4 without a window"),
    "sinks and a causal window ahead": ({"sink_tokens": 4, "causal": True, "window_size": (None, 3)}, "sink_tokens = 4"),
    "prefix of all": ({"prefix": 4}, "prefix = 4 where every row attends all keys"),
    "no queries": ({"queries": (5, 5)}, r"queries = \(5, 5\): expected 0 <= start < stop <= 100"),
    "queries beyond": ({"queries": (5, 101)}, "queries"),
    "heads twice": ({"heads": (1, 1)}, r"heads = \[1, 1\]: expected ascending indices of query heads"),
    "heads beyond": ({"heads": (1, 6)}, "heads"),
    "no heads": ({"heads": ()}, "heads"),
    "documents of keys alone": ({"cu_seqlens_k": [0, 100]}, "cu_seqlens_k is given without cu_seqlens_q"),
    "documents of queries alone": (
        {"q": (2, 6, 90, 64), "cu_seqlens_q": [0, 90]},
        "cu_seqlens_q is given alone, for 90 queries and 100 keys",
    ),
    "as many documents": (
        {"cu_seqlens_q": [0, 50, 100], "cu_seqlens_k": [0, 100]},
        "cu_seqlens_q has 2 documents and cu_seqlens_k has 1",
    ),
    "boundaries that fall by more than 64 bits hold": (
        {"cu_seqlens_q": [0, 2**63 - 1, -2, 100], "cu_seqlens_k": [0, 1, 2, 100]},
        "cu_seqlens_q falls from 9,223,372,036,854,775,807 to -2 at 2",
    ),
    "boundaries that fall": ({"cu_seqlens_q": [0, 60, 50, 100]}, "cu_seqlens_q falls from 60 to 50 at 2"),
    "boundaries that end early": ({"cu_seqlens_q": [0, 60]}, "cu_seqlens_q runs from 0 to 60: expected 0 to 100"),
    "boundaries that begin late": ({"cu_seqlens_q": [1, 100]}, "cu_seqlens_q runs from 1 to 100"),
    "one boundary": ({"cu_seqlens_q": [0]}, r"cu_seqlens_q has shape \[1\]"),
    "boundaries of each entry": ({"cu_seqlens_q": [[0, 100]]}, r"cu_seqlens_q has shape \[1, 2\]"),
    "keys used and documents": ({"cu_seqlens_q": [0, 100], "seqused_k": [5, 5]}, "both given"),
    "keys used of one entry": ({"seqused_k": [5]}, r"seqused_k has shape \[1\]: expected \[2\]"),
    "keys used beyond": ({"seqused_k": [5, 101]}, "seqused_k has values from 5 to 101: expected 0 to 100"),
    "keys used before": ({"seqused_k": [-1, 5]}, "seqused_k has values from -1"),
    "slopes of few heads": ({"alibi_slopes": [1.0]}, r"alibi_slopes has shape \[1\]: expected \[6\] or \[2, 6\]"),
    "slopes NaN": ({"alibi_slopes": [math.nan] * 6}, "alibi_slopes has values that are not finite"),
    "sinks of each entry": ({"learnable_sink": [[0.0] * 6] * 2}, r"learnable_sink has shape \[2, 6\]: expected \[6\]"),
    "sinks Inf": ({"learnable_sink": [math.inf] * 6}, "learnable_sink has values that are not finite"),
    "bias of KV heads": ({"bias": (2, 3, 100)}, r"is float32 \[2, 3, 100\]: expected float32 \[1 or 2, 1 or 6, 100\]"),
    "bias of fewer keys": ({"bias": (2, 1, 99)}, "key_bias=False"),
    "bias in float64": ({"bias": (2, 1, 100), "bias_dtype": "float64"}, "'key_bias' is float64"),
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
    made = problem(
        causal=True, scale=0.3, out_dtype="float32", window_size=(7, None), prefix=3, sink_tokens=2, softcap=4.0,
        queries=(1, 9), heads=(0, 5), alibi_slopes=[0.1] * 6, cu_seqlens_q=[0, 20, 100],
    )  # fmt: skip
    content = json.loads(json.dumps(to_json(made)))
    assert read_problem(content, made.given) == made
    assert read_problem(content, made.given).pairs == made.pairs


@pytest.mark.parametrize("others", [{}, {"cu_seqlens_q": [0, 21, 100]}, {"alibi_slopes": [1.0] * 6}])
def test_a_problem_is_read_with_its_own_arrays_only(others: dict) -> None:
    made = problem(cu_seqlens_q=[0, 20, 100])
    with pytest.raises(ValueError, match="digests"):
        read_problem(to_json(made), problem_options(**others).given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("batch", "query_heads", "kv_heads", "queries", "keys", "head_dim")
            for value in (0, 1.0)
        ),
        ("queries", True),
        ("queries", -1),
        ("queries", 1 << 63),
        ("keys", 1 << 49),
        ("head_dim", 1025),
        ("value_dim", 1025),
        ("kv_heads", 4),
        ("dtype", "float64"),
        ("out_dtype", None),
        ("causal", 1),
        ("window_size", [1]),
        ("window_size", [-1, None]),
        ("window_size", [1.5, None]),
        ("prefix", -1),
        ("prefix", 3),
        ("sink_tokens", 1),
        ("softcap", 0.0),
        ("softcap", "nan"),
        ("rows_asked", [0, 101]),
        ("rows_asked", [7, 7]),
        ("heads", [6]),
        ("heads", [2, 1]),
        ("digests", {"cu_seqlens_q": "0"}),
        ("scale", 0.0),
        ("scale", -1.0),
        ("scale", "inf"),
        ("scale", "1"),
        ("surprise", 1),
    ],
)
def test_json_of_no_valid_problem_is_refused(name: str, value: object) -> None:
    words = {
        "rows_asked": "rows_asked|queries",
        "sink_tokens": "sink_tokens",
        "digests": "digests",
        "surprise": "expected the fields",
    }
    allowed = words.get(name, f"{name}|{name.replace('_', ' ')}|multiple of the KV heads|larger than 1024")
    with pytest.raises(ValueError, match=allowed):
        read_problem({**to_json(problem()), name: value})


def test_a_problem_of_too_many_elements_is_refused() -> None:
    content = {**to_json(problem()), "batch": 1 << 16, "queries": 1 << 40, "rows_asked": [0, 1 << 40]}
    with pytest.raises(ValueError, match=r"fewer than 2\^63 elements"):
        read_problem(content)


def test_digests_tell_arrays_of_other_shapes_and_numbers_apart() -> None:
    arrays = np.arange(6.0), np.arange(6.0).reshape(2, 3), np.arange(1, 7.0)
    digests = [GivenArrays(alibi_slopes=array.astype("<f4")).digests["alibi_slopes"] for array in arrays]
    assert len({*digests}) == 3


@pytest.mark.parametrize("content", [None, 7, [], {}, {"batch": 1}])
def test_what_is_no_problem_at_all_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_problem(content)
