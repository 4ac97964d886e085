"""The sample is drawn as the certificate says: strata by place, the rest uniform, and the bound that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn_from
from hypothesis import strategies as st
from support import a_problem

from oocattn.problem.given import GivenArrays
from oocattn.problem.problem import Problem
from oocattn.verification.sampling import sample_rows, share_bound

PROBLEM = a_problem(1000, batch=2, query_heads=6, kv_heads=3)
BORDERS = range(100, 1000, 100)


@drawn_from(st.integers(1, 400), st.integers(1, 40), st.integers(1, 4), st.integers(0, 1000))
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


def tokens_of(problem: Problem, stratum: str, rows: int = 400, borders: range = BORDERS) -> set[int]:
    """The rows of q that were chosen for a stratum."""
    found = sample_rows(problem, borders, rows, 1)
    return {problem.rows_asked[0] + place.token for place in found if stratum in place.strata}


MASKS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "nothing turns": ({"causal": True}, set()),
    "window": ({"window_size": (99, 9), "causal": False}, {99, 100, 989, 990}),  # row 100 is without key 0, 990 has key 999
    "sinks": ({"window_size": (99, None), "sink_tokens": 4}, {99, 100, 103, 104}),
    "prefix": ({"prefix": 250}, {249, 250}),
    "more keys": ({"keys": 1500, "window_size": (799, None)}, {299, 300}),
    "fewer keys": ({"keys": 600}, {399, 400}),  # row 400 is the first with a key
    "rows asked": ({"keys": 600, "window_size": (99, None), "rows_asked": (450, 800)}, {499, 500}),
}


@pytest.mark.parametrize(("asked", "expected"), MASKS.values(), ids=MASKS)
def test_both_sides_of_the_turns_of_a_mask_are_there(asked: dict[str, Any], expected: set[int]) -> None:
    assert tokens_of(a_problem(1000, **asked), "mask") == expected


def test_first_and_last_rows_of_documents_are_there_also_of_one_without_keys() -> None:
    edges, edges_k = np.array([0, 10, 10, 300, 640, 1000]), np.array([0, 50, 90, 90, 500, 700])
    given = GivenArrays(cu_seqlens_q=edges, cu_seqlens_k=edges_k)
    problem = a_problem(1000, keys=700, given=given)
    assert tokens_of(problem, "document") == {0, 9, 10, 299, 300, 639, 640, 999}
    for seed in range(20):
        found = sample_rows(problem, [], 16, seed)
        assert {10, 299} <= {place.token for place in found if "document" in place.strata}
    assert tokens_of(problem, "mask") == {799, 800}  # the first with a key of the last document's 200
    some = a_problem(1000, keys=700, given=given, rows_asked=(20, 320), causal=False)
    assert tokens_of(some, "document") == {20, 299, 300, 319}


def test_rows_of_every_number_of_used_keys_are_there() -> None:
    used = np.array([0, 1000, 400])
    problem = a_problem(1000, batch=3, query_heads=2, given=GivenArrays(seqused_k=used))
    found = sample_rows(problem, BORDERS, 400, 1)
    assert {(place.batch, place.token) for place in found if "document" in place.strata} == {
        (batch, token) for batch in range(3) for token in (0, 999)
    }
    assert {(place.batch, place.token) for place in found if "mask" in place.strata} == {(2, 599), (2, 600)}


def test_kinds_of_places_share_what_is_not_uniform() -> None:
    given = GivenArrays(cu_seqlens_q=np.arange(0, 1001, 20))
    problem = a_problem(1000, window_size=(5, None), sink_tokens=3, given=given)
    found = sample_rows(problem, BORDERS, 64, 3)
    counts = {name: sum(name in place.strata for place in found) for name in ("border", "document", "mask", "uniform")}
    assert counts["uniform"] == 48
    assert min(counts["border"], counts["document"], counts["mask"]) >= 4


def test_heads_and_rows_that_are_asked_for_are_places_of_out() -> None:
    problem = a_problem(1000, query_heads=8, kv_heads=2, heads=(1, 2, 7), rows_asked=(900, 950))
    found = sample_rows(problem, range(10, 50, 10), 10_000, 0)
    assert {(place.head, place.token) for place in found} == {(head, token) for head in range(3) for token in range(50)}
