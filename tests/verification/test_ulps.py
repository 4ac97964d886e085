"""Errors in units of the last place, against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support import numpy_type

from oocattn.verification.recompute import error_in_ulps

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


@pytest.mark.parametrize(("found", "exact", "dtype", "expected"), HAND_COMPUTED)
def test_errors_in_units_of_the_last_place(found: float, exact: float, dtype: str, expected: float) -> None:
    assert error_in_ulps(np.array([found]), np.array([exact]), dtype) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_rounded_number_is_at_most_half_a_unit_off(dtype: str) -> None:
    exact = np.random.default_rng(0).standard_normal(10_000) * np.logspace(-4, 4, 10_000)
    ulps = error_in_ulps(exact.astype(numpy_type(dtype)).astype(np.float64), exact, dtype)
    assert 0.49 < ulps.max() <= 0.5
    assert ulps.mean() == pytest.approx(0.25, abs=0.01)
