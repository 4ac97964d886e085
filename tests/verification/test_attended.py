"""The mask's second definition: equal to a dense matrix and to `problem.mask`, and what follows from ranges of any kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compositions import Case, make_case
from reference import mask_by_definition
from support import a_problem, problem_options

from oocattn.problem.arrays import ArraySpec
from oocattn.problem.problem import Problem, make_problem
from oocattn.verification.attended import AttendedKeys, Int64s, attended_ranges, count_attended, groups_of, key_positions


def matrix(ranges: Int64s, keys: int) -> np.ndarray:
    found = np.zeros((len(ranges), keys), bool)
    for row, of_row in enumerate(ranges):
        for first, last in of_row:
            assert not found[row, first:last].any(), "ranges of a row do not overlap"
            found[row, first:last] = True
    return found


def problem_of(case: Case) -> Problem:
    rows = {"q": (case.query_heads, case.queries), "k": (case.kv_heads, case.keys), "v": (case.kv_heads, case.keys)}
    dims = {"q": case.head_dim, "k": case.head_dim, "v": case.value_dim}
    specs = (ArraySpec(name, (case.batch, *rows[name], dims[name]), case.dtype) for name in "qkv")
    return make_problem(*specs, problem_options(**case.asked))


def check_definitions(case: Case) -> None:
    problem = problem_of(case)
    attended, distances = mask_by_definition(case.batch, case.queries, case.keys, **case.mask)
    rows = np.arange(*problem.rows_asked)
    for batch, expected in enumerate(attended[:, case.rows]):
        ranges = attended_ranges(problem, batch, rows)
        assert np.array_equal(matrix(ranges, case.keys), expected), f"{case}, batch {batch}"
        found = problem.mask(batch).bounds(range(*problem.rows_asked)).values()
        assert np.array_equal(matrix(found.reshape(-1, 2, 2), case.keys), expected), f"{case}, batch {batch}: problem.mask"
        positions = key_positions(problem, batch, rows)[:, None] - np.arange(case.keys)
        assert np.array_equal(positions[expected], distances[batch, case.rows][expected]), f"{case}, batch {batch}"
    assert count_attended(problem) == (problem.pairs, int((~attended[:, case.rows].any(2)).sum()) * problem.out_heads)


@pytest.mark.parametrize("first", [0, 250])
def test_both_definitions_of_a_mask_are_the_dense_matrix(first: int) -> None:
    for seed in range(first, first + 250):
        check_definitions(make_case(seed))


@pytest.mark.slow
def test_both_definitions_of_many_masks_are_the_dense_matrix() -> None:
    for seed in range(10_000, 30_000):
        check_definitions(make_case(seed))


LONG: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (4096, None), "sink_tokens": 4},
    "an endless window": {"window_size": (2**62, 5)},
    "documents": {"causal": True, "cu_seqlens_q": np.arange(0, 300_001, 100)},
    "fewer keys used": {"causal": True, "seqused_k": [200_000], "prefix": 10},
}


@pytest.mark.parametrize("asked", LONG.values(), ids=LONG)
def test_pairs_of_long_problems_are_counted_alike(asked: dict[str, Any]) -> None:
    """Row by row, a block of rows at a time, and by closed forms."""
    spec = ArraySpec("q", (1, 3, 300_000, 8), "float16")
    problem = make_problem(spec, spec, spec, problem_options(**asked, queries=(7, 290_001), heads=(0, 2)))
    assert count_attended(problem)[0] == problem.pairs


def test_rows_without_a_key_are_counted_over_all_heads() -> None:
    problem = a_problem(0, queries=10, keys=4, query_heads=3)  # the last row is at the last key
    assert count_attended(problem) == (3 * 10, 3 * 6)


def sink_and_window(tokens: Int64s) -> Int64s:
    """The first 3 keys and the last 20 up to a row's own, as two ranges that do not overlap."""
    last = tokens + 1
    sink = np.minimum(last, 3)
    return np.stack([np.stack([np.zeros_like(last), sink], -1), np.stack([np.maximum(last - 20, sink), last], -1)], 1)


def test_counts_spans_and_hidden_keys_follow_from_the_ranges() -> None:
    ranges = sink_and_window(np.array([0, 2, 10, 50, 60]))
    keys, expected = AttendedKeys(ranges), matrix(ranges, 70)
    assert keys.spans == [range(11), range(31, 61)]
    assert (keys.keys, keys.pairs) == (41, expected.sum())
    assert list(keys.tiles(20)) == [(0, 11), (31, 51), (51, 61)]
    for start, stop in ((0, 70), (0, 1), (2, 40), (45, 51), (65, 70)):
        np.testing.assert_array_equal(keys.count(start, stop), expected[:, start:stop].sum(1))
        hidden = keys.hidden(start, stop)
        np.testing.assert_array_equal(
            np.zeros((5, stop - start), bool) if hidden is None else hidden, ~expected[:, start:stop]
        )
    assert keys.hidden(0, 1) is None
    assert AttendedKeys(ranges[:0]).spans == []


def test_rows_are_recomputed_together_where_they_share_keys() -> None:
    def groups(tokens: list[int], asked: dict[str, Any], most: int = 256) -> list[int]:
        problem = a_problem(100_000, **asked)
        return [part.stop - part.start for part in groups_of(attended_ranges(problem, 0, np.asarray(tokens)), most)]

    rows = list(range(0, 100_000, 1000))
    assert groups(rows, {}) == [100]
    assert groups(rows, {}, 30) == [30, 30, 30, 10]
    assert groups(rows, {"window_size": (50, None)}) == [4] * 25  # of each row a quarter, where they share nothing
    assert max(groups(rows, {"window_size": (20_000, None)})) > 20
    assert groups([], {}) == []
