"""Sums over the elements of rows are those of float64, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import numpy_type

from oocattn.problem.second_pass import sign_vectors
from oocattn.verification import row_sums
from oocattn.verification.noise import rounding_variance
from oocattn.verification.row_sums import OutSums, RowSums

DTYPES = ["float16", "bfloat16", "float32"]
KINDS: dict[str, Any] = {
    "usual": 1.0,
    "small": 1e-3,
    "subnormal in float16": 1e-6,
    "squares that float32 has not": 1e-25,
    "squares beyond float32": 1e25,
    "zeros": 0.0,
    "one NaN": np.nan,
    "one Inf": np.inf,
}


def rows_of(dtype: str, columns: int = 64, count: int = 50) -> NDArray[Any]:
    """Rows of each kind, in turn."""
    found = np.random.default_rng(0).standard_normal((count, columns))
    for row, value in zip(found, np.resize([*KINDS.values()], count), strict=True):
        if np.isfinite(value):
            row *= value
        else:
            row[columns // 2] = value
    with np.errstate(over="ignore"):
        return found.astype(numpy_type(dtype))


def passed_of(out: NDArray[Any], signs: NDArray[np.float64]) -> NDArray[np.float32]:
    """Projections as a pass has them, a little off; of one row they are huge, and of one NaN."""
    with np.errstate(all="ignore"):
        found = out.astype(np.float64) @ signs * (1 + 1e-4 * np.random.default_rng(1).standard_normal((len(out), 8)))
        found[0, 2], found[8, 3] = 1e30, np.nan
        return found.astype(np.float32)


@pytest.fixture(params=[None, 256])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, or so small that the rows take several, the last one not full."""
    if request.param:
        monkeypatch.setattr(row_sums, "TILE", request.param * 8)
        monkeypatch.setattr(row_sums, "PRODUCT", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("columns", [1, 24, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_are_those_of_float64(dtype: str, columns: int) -> None:
    rows = rows_of(dtype, columns)
    exact = np.square(rows.astype(np.float64)).sum(axis=1)
    with np.errstate(all="ignore"):
        found = RowSums(dtype, columns, len(rows)).squares(rows)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("columns", [1, 24, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_out_are_compared_as_in_float64(dtype: str, columns: int) -> None:
    """Differences within a hundredth of the deviation of rounding, or of what the pass is off in float32."""
    out, signs = rows_of(dtype, columns), sign_vectors(0, columns).astype(np.float64)
    passed = passed_of(out, signs)
    with np.errstate(all="ignore"):
        exact, expected = out.astype(np.float64), passed.astype(np.float64)
        differences = np.abs(exact @ signs - expected).max(axis=1)
        squares = np.square(exact).sum(axis=1), np.square(expected).sum(axis=1) / 8
        found = OutSums(dtype, signs, len(out)).compare(out, passed)
    variance = rounding_variance(out)
    np.testing.assert_allclose(found[1:3], squares, rtol=1e-6)
    comparable = np.isfinite(differences)
    np.testing.assert_array_equal(np.isfinite(found[0]), comparable)
    np.testing.assert_allclose(found[3][comparable], variance[comparable], rtol=1e-6)
    error = np.abs(found[0] - differences)[comparable]
    assert (error <= 0.01 * np.sqrt(variance[comparable]) + 1e-6 * differences[comparable]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_alike_wherever_they_are(dtype: str) -> None:
    out, signs = rows_of(dtype), sign_vectors(0, 64).astype(np.float64)
    passed, sums = passed_of(out, signs), OutSums(dtype, signs, len(out))
    with np.errstate(all="ignore"):
        whole = sums.compare(out, passed).copy()
        for first in (1, 17, 49):
            np.testing.assert_array_equal(sums.compare(out[first:], passed[first:]), whole[:, first:])
