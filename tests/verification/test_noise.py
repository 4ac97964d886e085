"""The noise between a result and a second pass is as large as rounding makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import a_problem, numpy_type

from oocattn.verification.noise import KeyTerms, Quantiles, QueryTerms, WeightNoise, relative_noise, rounding_variance
from oocattn.verification.rounding import SMALLEST

UNIT = 2.0**-24


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_variance_of_rounding_is_that_of_the_spacing_of_each_number(dtype: str) -> None:
    smallest = SMALLEST[dtype]
    eps = float(np.finfo(numpy_type(dtype)).eps) if dtype != "bfloat16" else 2.0**-7
    numbers = [1.0, -1.99, 2.0, 0.75, 1000.0, 0.0, smallest, -5 * smallest]
    spacings = [eps, eps, 2 * eps, eps / 2, 512 * eps, smallest, smallest, smallest]
    out = np.array(numbers).astype(numpy_type(dtype))
    np.testing.assert_allclose(rounding_variance(out[:, np.newaxis]), np.square(spacings) / 12, rtol=1e-15)
    assert rounding_variance(out[np.newaxis])[0] == pytest.approx(np.square(spacings).sum() / 12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_variance_of_rounding_is_what_is_measured(dtype: str) -> None:
    exact = np.random.default_rng(0).standard_normal((2000, 64)) * 10.0 ** np.linspace(-6, 3, 2000)[:, np.newaxis]
    found = exact.astype(numpy_type(dtype))
    errors = np.square(found.astype(np.float64) - exact).sum(axis=1) / rounding_variance(found)
    assert errors.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("asked", "keys", "alibi", "expected"),
    [
        ({}, KeyTerms(4.0, 1.0, 0.0, None), 0.0, 4 + 14 + 6),  # 3 * 4 / 2, and 2 |lse|
        ({"softcap": 5.0}, KeyTerms(4.0, 1.0, 0.0, None), 0.0, 4 + 14 + 6 + 15),
        ({"softcap": 50.0}, KeyTerms(4.0, 1.0, 0.0, None), 0.0, 4 + 14 + 6 + 18),
        ({}, KeyTerms(4.0, 1.0, 2.0, None), 1.5, 4 + 14 + 6 + 3.5),
        ({}, KeyTerms(4.0, 1.0, 1e9, None), 1e9, 4 + 14 + 6 + 6 + 7 + np.log(1000) + 20),  # what weighs nothing is left out
    ],
)
def test_the_noise_of_a_score_follows_from_its_terms(
    asked: dict[str, Any], keys: KeyTerms, alibi: float, expected: float
) -> None:
    problem = replace(a_problem(1000), scale=0.5, **asked)
    rows = QueryTerms(np.array([3.0]), np.array([-7.0]), np.array([alibi]))
    assert relative_noise(problem, rows, keys) == pytest.approx([UNIT * expected])


def test_rounded_weights_add_to_the_noise() -> None:
    problem = a_problem(1000)
    assert WeightNoise.of(problem, False, False) == WeightNoise(0.0, 0.0)
    assert WeightNoise.of(problem, True, False) == WeightNoise(2.0**-22 / 3, 2.0**-20)
    assert WeightNoise.of(problem, True, True) == WeightNoise(2.0**-22, 2.0**-20)


def test_quantiles_are_bounds_at_most_a_tenth_too_large() -> None:
    numbers = np.exp(np.random.default_rng(0).standard_normal(10_000) * 3)
    found = Quantiles()
    assert found.at(0.5) == 0
    for part in np.split(numbers, 10):
        found.add(part)
    for share in (0.5, 0.99):
        exact = np.quantile(numbers, share)
        assert exact <= found.at(share) <= 1.1 * exact
    found.add(np.full(20_000, np.inf))
    assert found.at(0.5) == np.inf
