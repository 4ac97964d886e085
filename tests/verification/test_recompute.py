"""Rows in float64 are those of the formula, and errors are counted in units of the last place."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compositions import World, make_case
from in_memory import dataset_of, problem_of
from support import normal_arrays, numpy_type

from oocattn.problem.problem import Problem
from oocattn.verification.attended import AttendedKeys, attended_ranges
from oocattn.verification.recompute import GROUP_ROWS, ExactRow, compare_row, error_in_ulps, recompute_bytes, recompute_rows

HAND_COMPUTED = [  # found, exact, dtype, error in units of the last place, which at 1 is 2^-10, 2^-7 and 2^-23
    (1.0 + 2**-10, 1.0, "float16", 1.0),
    (1.0, 1.0 + 0.75 * 2**-10, "float16", 0.75),
    (-3.0, -3.0 + 2**-11, "float16", 0.25),  # between 2 and 4 a unit is twice as much
    (1.0, 1.0 + 2**-7, "bfloat16", 1.0),
    (0.5, 0.5 - 2**-10, "bfloat16", 0.25),  # rounds to 0.5, where a unit is 2^-8
    (1.0, 1.0 - 3 * 2**-23, "float32", 6.0),  # below 1 it is half as much
    (2**-24, 0.0, "float16", 1.0),  # subnormal numbers are 2^-24 apart
    (3 * 2**-24, 2**-20, "float16", 13.0),
    (2**-133, 0.0, "bfloat16", 1.0),
    (65504.0, 65504.0 + 8, "float16", 0.25),  # the largest, where a unit is 2^5
    (np.inf, 70000.0, "float16", 0.0),  # as it is rounded
    (65504.0, 70000.0, "float16", np.inf),
    (np.inf, 1.0, "float32", np.inf),
    (-np.inf, np.inf, "bfloat16", np.inf),
    (np.nan, np.nan, "bfloat16", 0.0),
    (np.nan, 1.0, "float16", np.inf),
    (1.0, np.nan, "float16", np.inf),
]

TOKENS = 210


@pytest.mark.parametrize(("found", "exact", "dtype", "expected"), HAND_COMPUTED)
def test_errors_in_units_of_the_last_place(found: float, exact: float, dtype: str, expected: float) -> None:
    assert error_in_ulps(np.array([found]), np.array([exact]), dtype) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_rounded_number_is_at_most_half_a_unit_off(dtype: str) -> None:
    exact = np.random.default_rng(0).standard_normal(10_000) * np.logspace(-4, 4, 10_000)
    ulps = error_in_ulps(exact.astype(numpy_type(dtype)).astype(np.float64), exact, dtype)
    assert 0.49 < ulps.max() <= 0.5
    assert ulps.mean() == pytest.approx(0.25, abs=0.01)


def test_exact_rows_are_the_same_for_any_tile_of_keys() -> None:
    """Also where K and V hold NaN and Inf, where rows skip keys, and with more rows than are recomputed together."""
    arrays = normal_arrays(TOKENS, heads=4, kv_heads=2, seed=3)
    arrays[1][0, 0, 150, 2], arrays[2][0, 1, 60, 1], arrays[2][0, 1, 90, 3] = np.nan, np.inf, np.nan
    bias = np.random.default_rng(0).standard_normal((1, 4, TOKENS), np.float32)
    asked = {"softcap": 5.0, "alibi_slopes": [0.1, 0.0, -0.1, 1.0], "learnable_sink": [-9.0, 0.0, 9.0, 1.0]}
    masks: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (20, 3), "sink_tokens": 4, **asked}]
    for mask in masks:
        used = bias if "softcap" in mask else None
        problem = problem_of(arrays, used, **mask)

        def rows(key_rows: int, problem: Problem = problem, used: Any = used) -> list[ExactRow]:
            options = {"borders": range(30, TOKENS, 30), "rows": 60 if problem.softcap else 700, "seed": 5}
            return list(recompute_rows(problem, dataset_of(arrays, used), **options, key_rows=key_rows))

        whole = rows(8192)
        assert len(whole) > (20 if problem.softcap else 2 * GROUP_ROWS)
        for key_rows in (1, 7, 64):
            for row, expected in zip(rows(key_rows), whole, strict=True):
                assert (row.head, row.token, row.strata) == (expected.head, expected.token, expected.strata)
                np.testing.assert_allclose(row.out, expected.out, rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(
                    [row.lse, row.size, row.allowed, row.allowed_lse],
                    [expected.lse, expected.size, expected.allowed, expected.allowed_lse],
                    rtol=1e-9,
                )


def check_exact_rows(seed: int) -> None:
    """All kinds of problems, with NaN where no row attends, against the dense definition."""
    case = make_case(seed)
    world = World.of(case)
    problem, dataset = problem_of(world.arrays, world.bias, **case.asked), dataset_of(world.arrays, world.bias)
    options = {"borders": range(7, problem.out_rows, 7), "rows": 60, "seed": seed, "key_rows": (3, 16, 8192)[seed % 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = list(recompute_rows(problem, dataset, **options))
    for row in rows:
        place = row.batch, row.head, row.token
        np.testing.assert_allclose(row.out, world.out[place], rtol=1e-9, atol=1e-12, err_msg=f"{place} of {case}")
        np.testing.assert_allclose(row.lse, world.lse[place], rtol=1e-11, atol=1e-12, err_msg=f"{place} of {case}")
        check = compare_row(problem, row, row.out.astype(numpy_type(problem.out_dtype)).astype("f8"), np.float32(row.lse))
        assert check.passed, f"{place} of {case}: {check}"


def test_exact_rows_of_every_kind_of_problem_are_those_of_the_definition() -> None:
    for seed in range(150):
        check_exact_rows(seed)


@pytest.mark.slow
def test_exact_rows_of_many_problems_are_those_of_the_definition() -> None:
    for seed in range(10_000, 20_000):
        check_exact_rows(seed)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_size_of_a_row_is_that_of_its_values(rounded: bool) -> None:
    arrays = normal_arrays(TOKENS)
    problem = problem_of(arrays, causal=True)
    options: dict[str, Any] = {"weight_roundoff": 2.0**-11} if rounded else {}
    for row in recompute_rows(problem, dataset_of(arrays), borders=[], rows=20, seed=1, key_rows=64, **options):
        of_heads = (array[0, head] for array, head in zip(arrays, (row.head, 0, 0), strict=True))
        query, key, value = (array[: row.token + 1].astype(np.float64) for array in of_heads)
        weights = np.exp(problem.scale * (key @ query[-1]))
        lengths = np.linalg.norm(value, axis=1)
        assert row.size == pytest.approx(weights @ lengths / weights.sum(), rel=1e-12)
        by_chance = np.linalg.norm(weights * lengths) / weights.sum()
        assert row.chance == pytest.approx(by_chance if rounded else 0.0, rel=1e-12)


def test_rows_that_are_short_by_chance_show_something() -> None:
    """Of few columns, where weights are rounded to bfloat16."""
    arrays = normal_arrays(4096, heads=1, head_dim=16)
    problem = replace(problem_of(arrays), dtype="bfloat16", out_dtype="bfloat16")
    rows = list(recompute_rows(problem, dataset_of(arrays), borders=[], rows=300, seed=0, weight_roundoff=2.0**-8))
    checks = [compare_row(problem, row, row.out, row.lse) for row in rows]
    assert all(check.shows for check in checks)
    short = [row.chance / np.linalg.norm(row.out) for row in rows]
    assert max(short) > 1.5
    assert [check.length for check in checks] == pytest.approx(
        [max(row.chance, float(np.linalg.norm(row.out))) for row in rows], rel=1e-12
    )
    nearly_nothing = replace(rows[0], out=rows[0].out / 1000)
    assert compare_row(problem, nearly_nothing, nearly_nothing.out, rows[0].lse).length < rows[0].chance / 20


def test_what_sums_lose_of_one_sign_falls_with_the_keys_that_differ() -> None:
    rng, keys = np.random.default_rng(0), 1 << 18
    q, v = rng.standard_normal((1, 1, 1, 16)).astype("f4"), rng.standard_normal((1, 1, keys, 16)).astype("f4")
    allowed = {}
    for different in (3, 1 << 15, keys):
        k = np.tile(rng.standard_normal((different, 16)), (keys // different + 1, 1))[:keys].astype("f4")[None, None]
        problem = problem_of((q, k, v))
        (row,) = recompute_rows(problem, dataset_of((q, k, v)), borders=[], rows=1, seed=0)
        allowed[different] = row.allowed / np.linalg.norm(row.out)
    assert allowed[1 << 15] < 4 * allowed[keys]  # sqrt(8) times, as errors that vary
    assert allowed[3] > 7 * allowed[keys]


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({"causal": True, "window_size": (99, None)}, 40 * 100),
        ({"causal": True, "window_size": (99, None), "sink_tokens": 3}, 40 * 103),
        ({"cu_seqlens_q": np.arange(0, 30_001, 100)}, 40 * 100),
        ({"causal": True, "queries": (500, 900)}, 900 + 900 // 2),
        ({"seqused_k": [1000]}, 1000),
    ],
    ids=["window", "sinks", "documents", "rows asked", "keys used"],
)
def test_keys_that_no_sampled_row_attends_are_not_read(asked: dict[str, Any], most: int) -> None:
    q, k, v = normal_arrays(30_000, heads=1)
    dataset = dataset_of((q, k, v))
    problem = problem_of((q, k, v), **asked)
    rows = list(recompute_rows(problem, dataset, borders=[], rows=40, seed=0))
    ranges = attended_ranges(problem, 0, problem.rows_asked[0] + np.asarray([row.token for row in rows]))
    attended = AttendedKeys(ranges)
    for name in "kv":
        read = {token for part in dataset.arrays[name].read for token in part}
        assert read == {token for span in attended.spans for token in span}
        assert sum(map(len, dataset.arrays[name].read)) <= most


TERMS = {"softcap": 5.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.4], "learnable_sink": [0.0, 1.0, 2.0, 3.0]}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("key_rows", [64, 600])
@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True, "window_size": (700, None), "sink_tokens": 9}], ids=["full", "window"]
)
def test_the_memory_that_is_planned_is_enough(mask: dict[str, Any], heads: int, key_rows: int, threads: int) -> None:
    """Without terms, and with all of them and a bias of each head."""
    arrays = normal_arrays(1500, heads=4, head_dim=32, dtype="float16")
    bias = np.zeros((1, heads, 1500), np.float32) if heads else None
    problem, dataset = problem_of(arrays, bias, **mask, **(TERMS if heads else {})), dataset_of(arrays, bias)
    tracemalloc.start()
    try:
        for _ in recompute_rows(problem, dataset, borders=[], rows=GROUP_ROWS, seed=0, key_rows=key_rows, threads=threads):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most = recompute_bytes(problem, dataset, GROUP_ROWS, key_rows, threads)
    assert peak <= most + (1 << 20)  # places, and Python's own
