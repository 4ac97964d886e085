"""A certificate says what follows from its findings, survives JSON, and is not made of anything else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from support import a_problem

from oocattn import Certificate, IntegrityError
from oocattn.storage.results.rows import Damage
from oocattn.verification.findings import ArrayCheck, Ledger, RowCheck
from oocattn.verification.text import certificate_page

PROBLEM = a_problem(1000, query_heads=2)


def row(head: int, token: int, *strata: Any, **errors: float) -> RowCheck:
    usual = {
        "length": 2.0, "error": 1e-4, "allowed": 5e-4, "lse_error": 1e-6, "allowed_lse": 1e-5,
        "ulps": 0.5, "mean_ulps": 0.25, "lse_ulps": 1.0,
    }  # fmt: skip
    return RowCheck(0, head, token, strata, **{**usual, **errors})


ROWS = (
    row(0, 0, "first"),
    row(1, 999, "last", "uniform", error=3e-4, ulps=0.75, mean_ulps=0.5),
    *(row(0, token, "uniform") for token in range(1, 60)),
)
DAMAGE = Damage("out", 0, 1, 500, 1000, "checksum 00000000, written with 12345678")

RIGHT = Certificate(
    result="/data/out & more.zarr",
    dataset="/data/qkv.zarr",
    problem=PROBLEM,
    words=str(PROBLEM),
    asked=64,
    seed=7,
    rows=ROWS,
    arrays=(ArrayCheck("out", "checked", 4, ()), ArrayCheck("lse", "checked", 4, ())),
    digest="ab" * 32,
    ledger=Ledger(1_001_000, 1_001_000, 0, 0, 0, 0, 0, ""),
    dataset_recorded="cd" * 32,
    dataset_found="cd" * 32,
    computed_with={"oocattn": "0.1.0", "zarr": "3.1.6"},
    verified_with={"oocattn": "0.1.0", "zarr": "3.1.7"},
    made="2030-01-02T03:04:05+0000",
)
WRONG = replace(RIGHT, rows=(row(1, 3, "border", error=1e-3), *ROWS))
UNREADABLE = replace(RIGHT, rows=(row(1, 3, "border", error=math.nan, lse_error=math.nan, ulps=math.inf), *ROWS))
DAMAGED = replace(RIGHT, arrays=(ArrayCheck("out", "checked", 4, (DAMAGE,)), RIGHT.arrays[1]), ledger=None)
UNKNOWN = replace(
    RIGHT, arrays=(ArrayCheck("out", "not recorded", 0, ()), ArrayCheck("lse", "not checked", 4, ())), digest=None
)
VAGUE = (
    row(0, 61, "uniform", allowed=0.02),
    row(0, 62, "uniform", allowed_lse=0.02),
    row(0, 63, "uniform", allowed=math.inf),
)
SOME_VAGUE = replace(RIGHT, rows=(*ROWS, *VAGUE))
INCONCLUSIVE = replace(RIGHT, rows=(*ROWS[:25], *VAGUE))
VAGUE_AND_WRONG = replace(WRONG, rows=(*WRONG.rows[:5], *VAGUE))
ALL = [RIGHT, WRONG, UNREADABLE, DAMAGED, UNKNOWN, SOME_VAGUE, INCONCLUSIVE, VAGUE_AND_WRONG]


def test_a_verdict_names_the_elements_that_a_narrow_dtype_lost() -> None:
    lost = replace(RIGHT, ledger=Ledger(1_001_000, 1_001_000, 0, 12, 12, 3456, 0, ""))
    assert lost.passed
    assert lost.verdict == (
        "passed, but 12 elements of out are Inf, too large for its dtype, but 3,456 elements of out are 0, too small for "
        "its dtype"
    )
    assert Certificate.from_json(lost.to_json()) == lost


def test_a_certificate_states_a_bound_on_wrong_rows() -> None:
    assert RIGHT.drawn == 60
    assert RIGHT.statement == (
        "of 60 rows drawn uniformly at random none exceeds its tolerance: with 95% confidence fewer than 3/60 = 5.00% of "
        "all 2,000 rows do (1 - 0.05^(1/60) = 4.87%)"
    )
    one = replace(RIGHT, rows=ROWS[:3])
    assert "with 95% confidence at most 77.64% of all 2,000 rows do" in one.statement
    every = replace(RIGHT, problem=a_problem(30, query_heads=2))
    assert every.statement == "all 60 rows were recomputed, and none exceeds its tolerance"


@pytest.mark.parametrize("wrong", [WRONG, UNREADABLE])
def test_with_a_wrong_row_nothing_is_claimed(wrong: Certificate) -> None:
    """Also where that is not one of those drawn at random."""
    assert not wrong.passed
    assert "95%" not in str(wrong)
    assert "FAILED: 1 of 62 rows are wrong" in str(wrong)


def test_a_certificate_passes_where_nothing_is_wrong() -> None:
    assert [certificate.passed for certificate in ALL] == [True, False, False, False, True, True, False, False]
    assert [certificate for certificate in ALL if certificate.inconclusive] == [INCONCLUSIVE]
    assert [certificate.failed for certificate in ALL] == [False, True, True, True, False, False, False, True]
    assert "FAILED: 1 of 8 parts are not as they were written" in str(DAMAGED)
    assert not row(0, 0, "uniform", lse_error=1e-4).passed
    assert not row(0, 0, "uniform", error=math.nan).passed


def test_rows_that_show_nothing_are_not_counted() -> None:
    """They are not wrong; where they are more than a tenth, the certificate is inconclusive."""
    assert [certificate.strata[-1].showing_nothing for certificate in (RIGHT, SOME_VAGUE, INCONCLUSIVE)] == [0, 3, 3]
    assert (SOME_VAGUE.drawn, SOME_VAGUE.conclusive) == (63, 60)
    assert SOME_VAGUE.verdict == "passed"
    assert "of 60 rows drawn uniformly at random none exceeds its tolerance" in SOME_VAGUE.statement
    assert "fewer than 3/60 = 5.00% of all" in SOME_VAGUE.statement
    assert SOME_VAGUE.statement.endswith("not counting rows like 3 of the recomputed ones, which show nothing")
    assert INCONCLUSIVE.verdict.startswith("inconclusive: 3 of 28 rows show nothing")
    assert "3 of 28 recomputed rows show nothing" in str(INCONCLUSIVE)
    for said in ("95%", "passed"):
        assert said not in str(INCONCLUSIVE)
    assert VAGUE_AND_WRONG.verdict.startswith("FAILED: 1 of 8 rows are wrong")
    assert replace(RIGHT, rows=(*ROWS[:27], *VAGUE)).passed  # a tenth
    beyond = row(0, 0, "uniform", error=0.03, allowed=0.02)
    assert not beyond.passed
    assert replace(RIGHT, rows=(*ROWS, beyond)).wrong == [beyond]


def test_a_printed_certificate_is_escaped() -> None:
    strange = replace(RIGHT, result="/a\x1b[2Jb\nFAILED", dataset="\u202e/qkv")
    assert strange.result == "/a\x1b[2Jb\nFAILED"
    assert r"result       /a\x1b[2Jb\nFAILED" in str(strange).splitlines()
    assert r"dataset      \u202e/qkv, unchanged" in str(strange)
    reason = replace(
        DAMAGED, arrays=(ArrayCheck("out", "checked", 4, (replace(DAMAGE, reason="\x1b]0;"),)), RIGHT.arrays[1])
    )
    assert "\x1b" not in str(reason)


def test_a_certificate_has_strata_and_totals() -> None:
    first, last, uniform, every = RIGHT.strata
    assert [of.name for of in RIGHT.strata] == ["first", "last", "uniform", "all"]
    assert (first.rows, last.rows, uniform.rows, every.rows) == (1, 1, 60, 61)
    assert (last.error, last.ulps, last.mean_ulps, last.of_allowed) == (3e-4, 0.75, 0.5, pytest.approx(0.6))
    assert uniform.mean_ulps == pytest.approx((0.5 + 59 * 0.25) / 60)
    assert RIGHT.error == pytest.approx(math.sqrt((3e-4**2 + 60 * 1e-4**2) / 61))
    assert RIGHT.worst_error == 3e-4
    assert "relative error 1.1e-04 (root mean square over rows), 3.0e-04 in the worst row" in str(RIGHT)
    assert math.isnan(UNREADABLE.strata[-1].error)
    assert UNREADABLE.strata[-1].ulps == math.inf


def test_the_headline_is_of_all_rows_alike_and_of_those_that_show_something() -> None:
    """A row of a few keys is ten thousand times as long as one of many."""
    long = row(0, 0, "first", length=1e4, error=1e-7)
    assert replace(RIGHT, rows=(long, *ROWS[1:])).error == pytest.approx(RIGHT.error, rel=0.1)
    assert (SOME_VAGUE.error, SOME_VAGUE.worst_error) == (RIGHT.error, RIGHT.worst_error)
    none = replace(RIGHT, rows=(row(0, 0, "uniform", error=0.5, allowed=math.inf),))
    assert (none.error, none.worst_error) == (0.5, 0.5)
    assert math.isnan(UNREADABLE.error)
    assert replace(WRONG, rows=(*WRONG.rows, row(0, 0, "uniform", error=math.inf))).worst_error == math.inf


def test_the_words_for_a_terminal() -> None:
    text = str(RIGHT)
    assert "out: all 4 parts are as they were written" in text
    assert f"digest {'ab' * 32}" in text
    assert "1 Mpairs counted by the run, exactly those expected; 0 NaN or Inf in the inputs, 0 in out" in text
    assert text.endswith("\npassed")
    assert text.count("passed") == 1
    assert max(map(len, text.splitlines())) < 200
    assert "not available: the folder of the run is not beside the result" in str(DAMAGED)
    assert "out, batch 0, head 1, tokens 500 to 999: checksum 00000000, written with 12345678" in str(DAMAGED)
    assert "not known to be the one that the run read" in str(replace(RIGHT, dataset_found="ef" * 32))
    without = replace(RIGHT, ledger=Ledger(1_001_000, 1_001_000, 0, 0, 0, 0, 24, ""))
    assert "exactly those expected; 24 rows without a key; 0 NaN" in str(without)
    many = replace(RIGHT, rows=tuple(row(0, token, "uniform", error=1.0) for token in range(100)))
    assert str(many).count("WRONG") == 20
    assert "and 80 more" in str(many)


@pytest.mark.parametrize("certificate", ALL)
def test_a_certificate_survives_json(certificate: Certificate) -> None:
    text = json.dumps(certificate.to_json(), allow_nan=False)  # standard JSON: no bare NaN
    found = Certificate.from_json(json.loads(text))
    assert found.to_json() == certificate.to_json()
    assert (found.passed, found.made) == (certificate.passed, certificate.made)
    assert str(found) == str(certificate)
    assert json.loads(text)["statement"] == certificate.statement


def changed(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("passed", to=False),
        changed("format", to=1),
        changed("statement", to="all is well"),
        changed("rows", to=[]),
        changed("rows", to={}),
        changed("rows", 3, to=7),
        changed("rows", 3, "error", to="1e-4"),
        changed("rows", 3, "error", to=1.0),
        changed("rows", 3, "allowed", to=0.0),
        changed("rows", 3, "head", to=True),
        changed("rows", 3, "head", to=2),
        changed("rows", 3, "batch", to=-1),
        changed("rows", 3, "token", to=1000),
        changed("rows", 3, "token", to=1 << 70),
        changed("rows", 3, "length", to="inf"),
        changed("rows", 3, "allowed", to="nan"),
        changed("rows", 3, "ulps", to=-1.0),
        changed("asked", to=0),
        changed("seed", to=-1),
        changed("arrays", 0, "parts", to=-4),
        changed("problem", "keys", to=0),
        changed("problem", "kv_heads", to=3),
        changed("problem", "dtype", to="float64"),
        changed("problem", "scale", to="nan"),
        changed("problem", "rows_asked", to=[5, 1001]),
        changed("problem", "window_size", to=[-1, 0]),
        changed("words", to=7),
        changed("ledger", "out_not_finite", to=-1),
        changed("inconclusive", to=True),
        changed("rows", 3, "strata", 0, to="chosen"),
        changed("arrays", 0, "state", to="perfect"),
        changed("arrays", 0, "damaged", to=[{"array": "out"}]),
        changed("problem", "queries", to=None),
        changed("ledger", "counted", to="many"),
        changed("digest", to=5),
        changed("computed_with", "zarr", to=3),
        changed("surprise", to=1),
        lambda content: content.pop("seed"),
        lambda content: content.pop("verdict"),
        lambda content: content.clear(),
    ],
)
def test_json_that_is_no_certificate_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(json.dumps(RIGHT.to_json()))
    change(content)
    with pytest.raises(IntegrityError, match="not a certificate of oocattn"):
        Certificate.from_json(content)


class Text(HTMLParser):
    """What a page says; it checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.said = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.mark.parametrize("certificate", ALL)
def test_the_page_says_it_all_and_stands_alone(certificate: Certificate) -> None:
    page = Text(certificate_page(certificate))
    assert "script" not in page.tags
    problem = certificate.problem
    for said in (certificate.verdict, certificate.statement[1:], certificate.again, certificate.made, str(problem)):
        assert said in page.said
    for said in (certificate.result, certificate.dataset, certificate.dataset_found, "zarr 3.1.7", "seed7"):
        assert said in page.said
    assert (str(certificate.digest) in page.said) == (certificate.digest is not None)
    assert ("WRONG" in page.said) == bool(certificate.wrong)
    assert page.said.count("shows nothing") - 1 == min(len(certificate.showing_nothing), 10 - len(certificate.wrong))
    assert all(str(damage) in page.said for damage in certificate.damaged)
    assert (page.said.index("Checksums are CRC-32") < page.said.index("What was checked")) == bool(certificate.damaged)


def test_names_cannot_write_into_the_page() -> None:
    page = Text(certificate_page(replace(RIGHT, dataset="<script>alert(1)</script>")))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.said
