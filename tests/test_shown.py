"""Public records show themselves as one short line, and in notebooks as a small well-formed table."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support import GENEROUS, MACHINE, a_problem

from oocattn import Certificate, Plan, Result, RunReport, Status
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost
from oocattn.problem.problem import Problem
from oocattn.storage.results.summary import Summary
from oocattn.verification.findings import ArrayCheck, RowCheck

HOSTILE = '</td><script>alert("1")</script>&amp;\x1b[2J\n' + "long " * 1000 + "https://me:secret@host/x"
PROBLEM: Problem = a_problem(1000)
PLAN = make_plan(PROBLEM, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)
REPORT = RunReport(
    seconds=2.0, predicted_seconds=1.5, tokens=1000, subproblems=7, lanes=1, pairs=500_500, pairs_before=0, bytes_read=10,
    bytes_partials=20, bytes_written=30, not_finite=1, out_not_finite=1, recomputed=1, retried=1, workers_lost=1,
    busy={"staged": 1.0}, compute_busy=0.5, out_of_memory=1, chunks_before=1, chunks_compared=1, other_bits=HOSTILE,
    finished="2030-01-02T03:04:05+0000",
)  # fmt: skip
ROW = RowCheck(0, 0, 0, ("uniform",), 2.0, 1e-4, 5e-4, 1e-6, 1e-5, 0.5, 0.25, 1.0)
CERTIFICATE = Certificate(
    result=HOSTILE, dataset=HOSTILE, problem=PROBLEM, words=str(PROBLEM), asked=64, seed=7, rows=(ROW,) * 64,
    arrays=(ArrayCheck("out", "checked", 4, ()), ArrayCheck("lse", "checked", 4, ())), digest="ab" * 32, ledger=None,
    dataset_recorded="cd" * 32, dataset_found="cd" * 32, computed_with={}, verified_with={}, made="2030-01-02T03:04:05+0000",
)  # fmt: skip
ARRAY: Any = SimpleNamespace(shape=(1, 2, 1000, 16), dtype="float32")
SUMMARY = Summary(4, False, False, HOSTILE, "2030", None, PROBLEM, "cd")
SHOWN = {
    "plan": PLAN,
    "plan with notes": replace(PLAN, inputs=InputCost(notes=(HOSTILE,))),
    "result": Result(HOSTILE, ARRAY, ARRAY, REPORT, SUMMARY),
    "result without report": Result("out.zarr", ARRAY, ARRAY, None),
    "no run": Status("none", result=HOSTILE),
    "running": Status("running", 10, 4, 1000, 5.0, 2.0, 3.0, 1, 2, 3, holder=HOSTILE, dashboard=HOSTILE, result=HOSTILE),
    "interrupted": Status("interrupted", 10, 4, 1000, error=HOSTILE),
    "finished": Status("finished", certificate="failed", verdict=HOSTILE),
    "report": REPORT,
    "certificate": CERTIFICATE,
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_repr_is_one_short_line(kind: str) -> None:
    text = repr(SHOWN[kind])
    assert text.startswith(f"<{type(SHOWN[kind]).__name__}: ")
    assert len(text) <= 250
    assert text.isprintable()
    assert "secret" not in text


@pytest.mark.parametrize("kind", SHOWN)
def test_a_notebook_shows_a_small_table(kind: str) -> None:
    text = SHOWN[kind]._repr_html_()
    table = ElementTree.fromstring(text)
    assert {element.tag for element in table.iter()} == {"table", "thead", "tbody", "tr", "th", "td"}
    assert {name for element in table.iter() for name in element.attrib} == {"style", "colspan"}
    assert not [word for word in ("color", "background", "secret", "\x1b", "\n") if word in text]
    rows = table.findall("tbody/tr")
    assert 1 < len(rows) <= 25
    assert all([cell.tag for cell in row] == ["th", "td"] and row[1].text for row in rows)


def test_a_table_says_what_matters() -> None:
    texts = {kind: "".join(ElementTree.fromstring(shown._repr_html_()).itertext()) for kind, shown in SHOWN.items()}
    assert all(word in texts["plan"] for word in ("1,000 tokens", "binds", "predicted", "peak memory", "kernel"))
    assert "alert" in texts["plan with notes"]
    assert "[1, 2, 1000, 16] float32" in texts["result"]
    assert "1,000 tokens" not in texts["result"]
    assert "40.0%" in texts["running"]
    assert "64 recomputed, 0 wrong" in texts["certificate"]
    assert "500 tokens/s" in texts["report"]


def test_a_finished_status_has_done_all_whatever_is_known_of_it() -> None:
    shares = [Status("finished").share, Status("finished", 7, 3).share, Status("running", 7, 9).share, Status("none").share]
    assert shares == [1.0, 1.0, 1.0, 0.0]
    assert cast(Plan, SHOWN["plan"]).to_json()["subproblems"] == PLAN.subproblems
