"""Rows in float64 are those of the formula, and errors are counted in units of the last place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import normal_arrays, numpy_type, write_dataset

from oocattn.problem.problem import make_problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.verification.recompute import GROUP_ROWS, error_in_ulps, recompute_rows

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


@pytest.mark.parametrize("causal", [False, True])
def test_exact_rows_are_the_same_for_any_tile_of_keys(tmp_path: Path, causal: bool) -> None:
    """Also where K and V hold NaN and Inf, and where there are more rows than are recomputed together."""
    arrays = normal_arrays(TOKENS, heads=4, kv_heads=2, seed=3)
    arrays[1][0, 0, 150, 2], arrays[2][0, 1, 60, 1], arrays[2][0, 1, 90, 3] = np.nan, np.inf, np.nan
    dataset = Dataset.open(write_dataset(tmp_path / "dataset.zarr", arrays))
    problem = make_problem(*dataset.specs, causal=causal)
    options = {"borders": range(30, TOKENS, 30), "rows": 700, "seed": 5}
    whole = list(recompute_rows(problem, dataset, **options))
    assert len(whole) > 2 * GROUP_ROWS
    for key_rows in (1, 7, 64):
        for row, expected in zip(recompute_rows(problem, dataset, **options, key_rows=key_rows), whole, strict=True):
            assert (row.head, row.token, row.strata) == (expected.head, expected.token, expected.strata)
            np.testing.assert_allclose(row.out, expected.out, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(
                [row.lse, row.size, row.allowed, row.allowed_lse],
                [expected.lse, expected.size, expected.allowed, expected.allowed_lse],
                rtol=1e-9,
            )


@pytest.mark.parametrize("causal", [False, True])
def test_exact_rows_are_those_of_the_formula(tmp_path: Path, causal: bool) -> None:
    """And so is the size of their values."""
    q, k, v = normal_arrays(TOKENS, heads=4, kv_heads=2, batch=2)
    dataset = Dataset.open(write_dataset(tmp_path / "dataset.zarr", (q, k, v)))
    problem = make_problem(*dataset.specs, causal=causal)
    for row in recompute_rows(problem, dataset, borders=[100], rows=50, seed=1, key_rows=64):
        keys = slice(0, row.token + 1 if causal else TOKENS)
        query = q[row.batch, row.head, row.token].astype(np.float64)
        key, value = (array[row.batch, row.head // 2, keys].astype(np.float64) for array in (k, v))
        scores = problem.scale * (key @ query)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(row.out, weights @ value, rtol=1e-11, atol=1e-13)
        assert row.lse == pytest.approx(np.log(np.exp(scores).sum()), rel=1e-12)
        assert row.size == pytest.approx(weights @ np.linalg.norm(value, axis=1), rel=1e-12)
