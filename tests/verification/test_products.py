"""Products that are cut into parts are those of whole matrices, and no part is so large that a BLAS begins threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oocattn.verification import products
from oocattn.verification.products import dot, multiply, weigh

SHAPES = [(1, 1, 1), (1, 5, 64), (8, 8192, 64), (8, 5000, 64), (64, 700, 64), (65, 700, 3), (200, 1025, 128), (3, 40, 5000)]


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The terms of the sums of each product of two matrices."""
    found, matmul = [], np.matmul

    def count(first: Any, second: Any, **options: Any) -> Any:
        found.append(first.shape[-2] * first.shape[-1] * second.shape[-1])
        return matmul(first, second, **options)

    monkeypatch.setattr(np, "matmul", count)
    return found


@pytest.mark.parametrize(("rows", "keys", "columns"), SHAPES)
def test_rows_are_multiplied_with_each_key(largest: list[int], rows: int, keys: int, columns: int) -> None:
    random = np.random.default_rng(0)
    query, key = random.standard_normal((rows, columns)), random.standard_normal((keys, columns))
    out = np.empty((rows, keys))
    multiply(query, key, out=out)
    np.testing.assert_allclose(out, query @ key.T, atol=1e-12 * columns)
    assert max(largest) <= max(products.TERMS, products.ROWS * columns)


@pytest.mark.parametrize(("rows", "keys", "columns"), SHAPES)
def test_values_are_weighed(largest: list[int], rows: int, keys: int, columns: int) -> None:
    """Also of a slice of all keys, as a tile is cut where partial sums are taken."""
    random = np.random.default_rng(0)
    weights, value = random.random((rows, keys)), random.standard_normal((keys, columns))
    for part in (slice(None), slice(1, max(2, keys - 3))):
        np.testing.assert_allclose(weigh(weights[:, part], value[part]), weights[:, part] @ value[part], atol=1e-12 * keys)
    assert max(largest) <= max(products.TERMS, products.ROWS * columns)


@pytest.mark.parametrize("keys", [1, 8191, 8192, 8193, 40_000])
def test_rows_are_multiplied_with_another(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Without a BLAS, which begins threads from 10,000 terms on."""
    random = np.random.default_rng(0)
    rows, other = random.standard_normal((3, keys + 1))[:, 1:], random.standard_normal(keys)
    expected = rows @ other
    for name in ("vecdot", "matmul", "dot", "inner", "vdot", "tensordot"):
        monkeypatch.setattr(np, name, lambda *_, **__: pytest.fail("a BLAS was called"))
    np.testing.assert_allclose(dot(rows, other), expected, atol=1e-12 * keys)


def test_no_key_is_nothing() -> None:
    np.testing.assert_array_equal(dot(np.ones((3, 0)), np.ones(0)), np.zeros(3))
    np.testing.assert_array_equal(weigh(np.ones((3, 0)), np.ones((0, 4))), np.zeros((3, 4)))
