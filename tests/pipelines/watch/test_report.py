"""A report adds the events of a run up, survives JSON, and reads well."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support import GENEROUS, GPU, a_problem, make_event

from oocattn import Event, IntegrityError, RunReport
from oocattn.pipelines.finished import FinishedChunk
from oocattn.pipelines.watch.events import Span
from oocattn.pipelines.watch.report import Tally
from oocattn.planning.candidates import make_plan
from oocattn.storage.journal.journal import ChunkId

PROBLEM = a_problem(1000)
PLAN = replace(
    make_plan(PROBLEM, GPU, device_memory=GENEROUS, host_memory=GENEROUS, chunks=7, decomposition="cqs"), seconds=1.0
)

ADDED = ("rows_without_keys", "out_overflowed", "out_underflowed", "out_elements", "not_finite_in")
"""Fields that older versions do not write."""

FINISHED = {
    (0, 0): FinishedChunk(5, 1, 3, 0, 0, 0, bytes=10, out="", lse=""),
    (0, 1): FinishedChunk(10, 3, 0, 2, 0, 0, bytes=20, out="", lse=""),
}


def report_of(events: list[Event], finished: dict[ChunkId, FinishedChunk] = FINISHED) -> RunReport:
    """The report of a run that has finished these chunks."""
    tally = Tally()
    for event in events:
        tally(event)
    return tally.report(PLAN, finished, seconds=2.0, lanes=2)


EVENTS = [
    make_event("started"),
    make_event("staged", 0, 1, bytes=100),
    make_event("staged", 1, 3, index=1, bytes=50),
    make_event("attended", 1, 2, pairs=7, partial_bytes=11),
    make_event("attended", 3, 4, index=1, pairs=8, partial_bytes=12),
    make_event("merged", 4, 6, pairs=15, spans=(Span("merge", 4, 4.5), Span("merge", 5.5, 6))),
    make_event("written", 5, 7, bytes=30, spans=(Span("write", 5, 5.5), Span("write", 6, 7))),
]


def test_events_are_added_up() -> None:
    report = report_of(EVENTS)
    assert (report.bytes_read, report.bytes_partials, report.bytes_written) == (150, 23, 30)
    assert (report.subproblems, report.pairs, report.not_finite, report.lanes) == (7, 15, 3, 2)
    assert report.pairs_before == 0
    assert report.busy == {"staged": 3.0, "attended": 2.0, "merged": 1.0, "written": 1.5}


def test_a_report_survives_json() -> None:
    report = report_of(EVENTS)
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_report_in_words() -> None:
    text = str(report_of(EVENTS))
    assert "in 2 s (predicted 1 s), 500 tokens/s" in text
    assert "7 subproblems on 2 lanes, 15 pairs, every one counted" in text
    assert "150 B read, 23 B of partials, 30 B written in all" in text
    assert "3 elements are NaN or Inf" in text
    assert "resumed" not in text
    assert "out          2 elements are NaN or Inf\n" in f"{text}\n"
    assert "rows         4 rows attend no key: " in text
    assert "attend no key" not in str(report_of(EVENTS, {(0, 0): replace(FINISHED[0, 0], rows_without_keys=0)}))
    alone = str(report_of(EVENTS, {(0, 1): FINISHED[0, 1]}))
    assert "\ninputs" not in alone
    assert "2 elements of out are NaN or Inf, and none of the inputs: float32 arithmetic overflowed" in alone
    assert "NaN" not in str(report_of(EVENTS, {(0, 1): replace(FINISHED[0, 1], out_not_finite=0)}))


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({}, []),
        ({"out_overflowed": 1}, ["1 elements of out are Inf because their values are too large for its dtype"]),
        ({"out_underflowed": 640}, []),
        ({"out_underflowed": 641}, ["641 elements of out are 0 because their values are too small for its dtype"]),
    ],
)
def test_a_report_names_losses_of_a_narrow_dtype(counts: dict[str, int], found: list[str]) -> None:
    report = report_of(EVENTS, {(0, 0): replace(FINISHED[0, 0], **counts)})
    assert report.out_elements == 64_000
    assert [line.partition(":")[0] for line in report.lost] == found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "fast"),
        ("seconds", -1.0),
        ("seconds", "nan"),
        ("pairs", -1),
        ("pairs", 1.0),
        ("pairs", True),
        ("lanes", 0),
        ("bytes_read", -1),
        ("not_finite", 1 << 97),
        ("out_not_finite", "none"),
        ("busy", []),
        ("busy", {"staged": "long"}),
        ("compute_busy", -0.1),
        ("finished", 7),
        ("format", 2),
        ("format", "1"),
    ],
)
def test_json_that_is_no_report_is_refused(name: str, value: object) -> None:
    with pytest.raises(IntegrityError, match=f"not the report of a run: .*{name if name != 'busy' else 'busy|staged'}"):
        RunReport.from_json({**report_of(EVENTS).to_json(), name: value})


def test_a_report_with_other_fields_is_refused() -> None:
    content = report_of(EVENTS).to_json()
    for changed in ({**content, "surprise": 1}, {}, {name: value for name, value in content.items() if name != "pairs"}):
        with pytest.raises(IntegrityError, match="not the report of a run: expected the fields"):
            RunReport.from_json(changed)


def test_a_report_of_an_older_version_is_read() -> None:
    report = report_of(EVENTS)
    older = {name: value for name, value in report.to_json().items() if name not in (*ADDED, "format", "rate")}
    assert RunReport.from_json(older) == replace(report, out_elements=1, rows_without_keys=0)
    assert RunReport.from_json(older).lost == []


def test_a_report_tells_what_a_resumed_run_found() -> None:
    resumed = replace(EVENTS[0], resumed=True)
    report = report_of([resumed, *EVENTS[1:4], *EVENTS[5:]])
    assert (report.pairs, report.pairs_before, report.not_finite, report.bytes_written) == (15, 8, 3, 30)
    assert "resumed      53.3% of the pairs were attended before" in str(report)
    assert "in 2 s since it was resumed (predicted 1 s), 233 tokens/s" in str(report)  # those attended since
    assert report_of([resumed, *EVENTS[1:]]).pairs_before == 0


def test_computing_is_a_share_of_the_lanes_time() -> None:
    """Two lanes for two seconds: 4 s in which compute could be busy; nothing else counts, and what is redone does."""
    spans = (Span("compute", 1.0, 1.5), Span("copy in", 0.0, 9.0), Span("compute", 2.0, 2.25))
    again = make_event("attended", 3, 4, pairs=7, spans=(Span("compute", 3.0, 3.25),))
    report = report_of([make_event("attended", 1, 2, pairs=7, spans=spans), again])
    assert report.compute_busy == 1.0 / 4.0
    assert "compute      busy 25.0% of the time" in str(report)
    assert report_of(EVENTS).compute_busy == 0.0


def test_out_of_memory_is_added_up_and_said() -> None:
    events = [make_event("attended", 0, 1, index=index, out_of_memory=index) for index in (0, 2, 1)]
    report = report_of(events)
    assert report.out_of_memory == 3
    assert "out of memory 3 times although the plan fits: continued with smaller tiles" in str(report)
    assert "out of memory" not in str(report_of(EVENTS))
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report
