"""What a certificate says of all rows follows from what was compared, survives JSON, and is not believed otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_certificate import DAMAGED, INCONCLUSIVE, RIGHT, WRONG, Text, changed, row

from oocattn import Certificate, IntegrityError
from oocattn.verification.findings import AllRows
from oocattn.verification.noise import SUSPICIOUS
from oocattn.verification.text import certificate_page

FOUND = AllRows(
    rows=2000, vectors=8, seed=7, suspected=0, recomputed=0, wrong_rows=0, wrong=(), open=0, worst=4.25,
    noise=2e-4, most_noise=3e-4, lse_noise=1e-6, computed_by="weights, strips", other=True,
)  # fmt: skip
ALL_ROWS = replace(RIGHT, all_rows=FOUND)
CLEARED = replace(RIGHT, all_rows=replace(FOUND, suspected=3, recomputed=3))
SPOILT_ROWS = tuple(row(1, token, error=1e-2) for token in (4, 900))
SPOILT = replace(RIGHT, all_rows=replace(FOUND, suspected=5, recomputed=5, wrong_rows=2, wrong=SPOILT_ROWS))
OPEN = replace(RIGHT, all_rows=replace(FOUND, suspected=1500, recomputed=1024))
NOISY = replace(RIGHT, all_rows=replace(FOUND, open=201, noise=0.02, most_noise=math.inf))
ALL = [ALL_ROWS, CLEARED, SPOILT, OPEN, NOISY, replace(WRONG, all_rows=FOUND), replace(DAMAGED, all_rows=FOUND)]


def test_the_verdict_follows_from_all_rows_too() -> None:
    outcomes = ["passed", "passed", "failed", "inconclusive", "inconclusive", "failed", "failed"]
    assert [certificate.outcome for certificate in ALL] == outcomes
    assert [certificate.passed for certificate in ALL] == [outcome == "passed" for outcome in outcomes]
    assert SPOILT.verdict.startswith("FAILED: 2 of 2,000 rows, found by a second pass, are wrong; compute it again")
    assert OPEN.verdict.startswith(
        "inconclusive: 1,500 rows differ from a second pass, and only 1,024 of them were recomputed"
    )
    assert NOISY.verdict.endswith("of 201 rows that a second pass does not show errors of 10%")
    both = replace(INCONCLUSIVE, all_rows=OPEN.all_rows).verdict
    assert both.startswith("inconclusive: 3 of 28 rows show nothing")
    assert "and 1,500 rows differ" in both
    assert replace(OPEN, all_rows=replace(OPEN.all_rows, wrong_rows=1, wrong=SPOILT_ROWS[:1])).outcome == "failed"


def test_the_statement_is_of_every_row_and_of_the_sample() -> None:
    assert ALL_ROWS.statement == (
        "every one of 2,000 rows was compared with a second pass over its pairs, and none is known to be wrong. An error of "
        "0.22% of a row of out, spread over its elements, is found with a probability of 99.9% in half of the rows, one of "
        "0.32% in 99 of 100 rows, and one of 9e-06 in lse"
    )
    assert "(3 differed, and are right in float64)" in CLEARED.statement
    assert SPOILT.statement.endswith("from which 5 differ: 2 of 5 that were recomputed are wrong")
    assert "1,500 differ from it, of which 1,024 were recomputed and are right" in OPEN.statement
    assert replace(WRONG, all_rows=FOUND).statement == f"{WRONG.statement}; {ALL_ROWS.statement}"


@pytest.mark.parametrize("noise", [1e-6, 3e-3])
def test_an_error_is_found_as_often_as_is_said(noise: float) -> None:
    """Errors in random directions, and the numbers of the pass as noisy as is counted."""
    random, error = np.random.default_rng(0), FOUND.found(noise)
    signs = random.choice([-1.0, 1.0], (64, 8))
    errors = random.standard_normal((200_000, 64))
    errors *= error / np.linalg.norm(errors, axis=1, keepdims=True)
    seen = np.abs(errors @ signs + noise * random.standard_normal((200_000, 8))).max(axis=1) > SUSPICIOUS * noise
    assert 0.999 <= seen.mean() < 0.9999


def test_an_error_of_one_large_element_escapes_one_in_256_at_most() -> None:
    """Whatever the other elements are: here the worst case, two that are alike."""
    random = np.random.default_rng(0)
    signs = random.choice([-1.0, 1.0], (200_000, 2, 8))
    assert (np.abs(signs.sum(axis=1)).max(axis=1) == 0).mean() == pytest.approx(1 / 256, rel=0.1)


@pytest.mark.parametrize("certificate", ALL)
def test_a_certificate_of_all_rows_survives_json(certificate: Certificate) -> None:
    text = json.dumps(certificate.to_json(), allow_nan=False)
    found = Certificate.from_json(json.loads(text))
    assert found == certificate
    assert str(found) == str(certificate)
    assert found.again == certificate.again


@pytest.mark.parametrize("certificate", ALL)
def test_page_and_words_say_what_was_compared(certificate: Certificate) -> None:
    page = Text(certificate_page(certificate))
    for said in (certificate.verdict, certificate.statement[1:], "(weights, strips)"):
        assert said in page.said
        assert said in str(certificate)
    assert certificate.again in page.said
    assert page.said.count("WRONG") == str(certificate).count("WRONG") == len(certificate.named_wrong)
    assert "all rows" in repr(certificate._table())


def test_a_row_that_was_found_twice_is_named_once() -> None:
    """By the sample, and by a second pass."""
    sampled = row(1, 4, "uniform", error=1e-2)
    twice = replace(SPOILT, rows=(sampled, *SPOILT.rows))
    assert [(each.head, each.token) for each in twice.named_wrong] == [(1, 4), (1, 900)]


SPOIL: dict[str, Callable[[dict[str, Any]], None]] = {
    "it is of another problem": changed("all_rows", "rows", to=1999),
    "more are wrong than were recomputed": changed("all_rows", "wrong_rows", to=6),
    "more were recomputed than suspected": changed("all_rows", "recomputed", to=7),
    "none is wrong": changed("all_rows", "wrong_rows", to=0),
    "the wrong rows are missing": changed("all_rows", "wrong", to=[]),
    "a wrong row is right": changed("all_rows", "wrong", 0, "error", to=0.0),
    "a wrong row is none of the problem": changed("all_rows", "wrong", 0, "token", to=1000),
    "the difference is not a number": changed("all_rows", "worst", to="nan"),
    "the noise is negative": changed("all_rows", "noise", to=-1.0),
    "nothing was found": changed("all_rows", to=None),
    "the statement is another": changed("statement", to="all rows are right"),
}


@pytest.mark.parametrize("spoilt", SPOIL)
def test_a_certificate_that_contradicts_itself_is_refused(spoilt: str) -> None:
    content = json.loads(json.dumps(SPOILT.to_json()))
    SPOIL[spoilt](content)
    with pytest.raises(IntegrityError, match="not a certificate of oocattn"):
        Certificate.from_json(content)


def test_a_certificate_of_an_older_version_says_nothing_of_all_rows() -> None:
    content = json.loads(json.dumps(RIGHT.to_json()))
    del content["all_rows"]
    assert Certificate.from_json(content) == RIGHT
    assert RIGHT.all_rows is None
