"""The sample is drawn as the certificate says: strata by place, the rest uniform, and the bound that follows from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import a_problem

from oocattn.verification.sampling import sample_rows, share_bound

PROBLEM = a_problem(1000, batch=2, query_heads=6, kv_heads=3)
BORDERS = range(100, 1000, 100)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
def test_a_sample_has_distinct_rows_and_never_more_than_asked(rows: int, tokens: int, heads: int, seed: int) -> None:
    problem = a_problem(tokens, query_heads=heads)
    found = sample_rows(problem, range(7, tokens, 7), rows, seed)
    assert len({(place.batch, place.head, place.token) for place in found}) == len(found) <= rows
    assert all(place.head in range(heads) and place.token in range(tokens) for place in found)
    assert found == sample_rows(problem, range(7, tokens, 7), rows, seed)
    drawn = sum("uniform" in place.strata for place in found)
    assert drawn >= min(problem.rows, max(1, rows - max(2, rows // 4)))


@pytest.mark.parametrize(("rows", "drawn"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 6), (64, 48), (100, 80)])
def test_most_are_drawn_uniformly(rows: int, drawn: int) -> None:
    found = sample_rows(PROBLEM, BORDERS, rows, 0)
    assert sum("uniform" in place.strata for place in found) == drawn
    names = {name for place in found for name in place.strata}
    assert names == {"uniform", *["last"] * (rows > 1), *["first"] * (rows > 2), *["border"] * (rows > 15)}


def test_rows_chosen_by_their_place_are_there() -> None:
    found = sample_rows(PROBLEM, BORDERS, 400, 1)
    tokens = {name: {place.token for place in found if name in place.strata} for name in ("first", "last", "border")}
    assert tokens["first"] == {0}
    assert tokens["last"] == {999}
    assert tokens["border"] == {token for border in BORDERS for token in (border - 1, border)}


def test_every_row_is_drawn_as_often_as_any_other() -> None:
    """Whether or not it is also chosen by its place: else the bound would not hold for those."""
    problem, draws = a_problem(10, query_heads=2), 4000
    counts = np.zeros((2, 10))
    for seed in range(draws):
        for place in sample_rows(problem, [5], 8, seed):
            counts[place.head, place.token] += "uniform" in place.strata
    expected = draws * 6 / 20
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 14 / 20)


def test_as_many_as_there_are_is_all_of_them() -> None:
    problem = a_problem(10, query_heads=2)
    found = sample_rows(problem, [5], 1000, 0)
    assert len(found) == 20
    assert all("uniform" in place.strata for place in found)


def test_the_bound() -> None:
    assert share_bound(1) == pytest.approx(0.95)
    assert share_bound(59) == pytest.approx(0.0495, abs=1e-4)  # the well-known 59 of 5% and 95%
    assert 2.99 / 3000 < share_bound(3000) < 3 / 3000


def test_the_bound_holds_as_often_as_it_says() -> None:
    """A result in which as large a share is wrong as the bound allows passes in 5% of samples, and not in more."""
    problem, rows = a_problem(500, query_heads=2), 40
    wrong = set(range(int(np.ceil(share_bound(30) * problem.rows))))
    samples = [sample_rows(problem, range(100, 500, 100), rows, seed) for seed in range(2000)]
    drawn = [{place.head * 500 + place.token for place in of if "uniform" in place.strata} for of in samples]
    assert {len(of) for of in drawn} == {30}
    assert np.mean([of.isdisjoint(wrong) for of in drawn]) == pytest.approx(0.05, abs=0.015)
