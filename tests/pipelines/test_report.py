"""A report adds the events of a run up, survives JSON, and reads well."""

from __future__ import annotations

import json

from oocattn import Event, RunReport
from oocattn.pipelines.report import Tally


def report_of(events: list[Event]) -> RunReport:
    tally = Tally()
    for event in events:
        tally(event)
    return tally.report(seconds=2.0, predicted_seconds=1.0, tokens=1000, lanes=2)


EVENTS = [
    Event("started", 0, 0, detail={"plan": "not counted"}),
    Event("staged", 0, 1, 0, 0, amount=100, detail={"not_finite": 3}),
    Event("staged", 1, 3, 0, 1, amount=50, detail={"not_finite": 0}),
    Event("attended", 1, 2, 0, 0, amount=7, detail={"partial_bytes": 11}),
    Event("attended", 3, 4, 0, 1, amount=8, detail={"partial_bytes": 12}),
    Event("merged", 4, 5, 0, 0, amount=15),
    Event("written", 5, 5.5, 0, 0, amount=30),
]


def test_events_are_added_up() -> None:
    report = report_of(EVENTS)
    assert (report.bytes_read, report.bytes_partials, report.bytes_written) == (150, 23, 30)
    assert (report.subproblems, report.pairs, report.not_finite, report.lanes) == (2, 15, 3, 2)
    assert report.busy == {"staged": 3.0, "attended": 2.0, "merged": 1.0, "written": 0.5}


def test_it_survives_json() -> None:
    report = report_of(EVENTS)
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_words() -> None:
    text = str(report_of(EVENTS))
    assert "in 2 s (predicted 1 s), 500 tokens/s" in text
    assert "2 subproblems on 2 lanes, 15 pairs, every one counted" in text
    assert "150 B read, 23 B of partials, 30 B written" in text
    assert "3 elements are NaN or Inf" in text
    assert "NaN" not in str(report_of(EVENTS[2:]))
