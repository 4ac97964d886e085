"""The page of a run in Dask's dashboard: its numbers are those of the events, whoever's cluster it is."""

from __future__ import annotations

import html
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from bokeh.client import pull_session
from bokeh.document import Document
from bokeh.models import LinearAxis
from bokeh.protocol.messages.patch_doc import patch_doc
from browser import look_at
from distributed import Client, LocalCluster
from support import MACHINE, Recorder, a_problem, carry_out, make_event, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Attended, Event, Plan, Recovered, Saved, Staged, Started, Written, clock
from oocattn.pipelines.engines.dask import page_words, runs
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.engines.dask.page import RunPage
from oocattn.pipelines.engines.dask.runs import UPDATE_SECONDS
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.board import RESOURCES, Board
from oocattn.pipelines.watch.events import Resource, Span
from oocattn.pipelines.watch.timeline import busy_seconds
from oocattn.planning.candidates import make_plan
from oocattn.storage.paths import ResultPaths
from oocattn.units import format_bytes


@pytest.fixture
def plan(fast_path: Path) -> Plan:
    return plan_for(write_dataset(fast_path / "dataset.zarr", normal_arrays(130, kv_heads=2)), chunks=13, causal=True)


def opened(client: Client, query: str = "") -> Document:
    """The document of the page, as a browser that opens it now has it."""
    url = client.dashboard_link.replace("/status", "/oocattn")
    urlopen(url, timeout=30).close()  # the first page that is asked for opens them all
    arguments = {"run": query} if query else {}
    with pull_session(url=url, arguments=arguments) as session:
        return session.document


def source(document: Document, name: str) -> Any:
    return document.select_one({"name": name}).data


def headline(document: Document) -> str:
    return str(document.select_one({"name": "headline"}).text)


def text(document: Document, name: str) -> str:
    """The words of a part of the page, without markup."""
    return html.unescape(re.sub("<[^>]*>", " ", document.select_one({"name": name}).text))


@dataclass(frozen=True)
class Look:
    """What the page showed after some events of a run, and when it was looked at."""

    events: list[Event]
    document: Document
    before: float
    after: float

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.kind == kind]

    def amounts(self, name: str) -> Iterator[tuple[float, float, float]]:
        """Amounts that the events tell of, and from when to when they were done."""
        for event in self.events:
            match name, event:
                case "tokens", Attended():
                    amount = event.pairs / 131  # pairs of a token, of both heads
                case ("read", Staged()) | ("written", Written()):
                    amount = event.bytes
                case _:
                    continue
            yield amount, min(span.start for span in event.spans), max(span.stop for span in event.spans)

    @property
    def done(self) -> int:
        """Subproblems that are done."""
        done = 0
        for event in self.events:
            done = 26 - event.left if isinstance(event, Started | Recovered) else done + isinstance(event, Attended)
        return done

    @property
    def saved(self) -> float:
        """When something was brought to disk for good."""
        written = [event.stop for event in self.events if isinstance(event, Written | Saved)]
        return max(written + [event.checkpointed for event in self.of("attended")])


def shown(name: str) -> str:
    """The expression of JavaScript for the words of a part of the page."""
    return f"(window.Bokeh?.documents[0]?.get_model_by_name('{name}')?.text ?? '')"


class FailingOnce:
    """The attend of a lane that fails the first time that it comes to a turn."""

    def __init__(self, turn: int) -> None:
        self._turn, self._real = turn, Lane.attend

    def __call__(self, lane: Lane, turn: int) -> Attended:
        if turn == self._turn:
            self._turn = -1
            raise OSError(5, "<Input/output error>")
        return self._real(lane, turn)


@pytest.fixture
def looks(plan: Plan, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """Of the page in a run of two heads with a fault: early, after the fault, and at the end."""
    recorder, seen, failing = Recorder([]), list[Look](), FailingOnce(9)
    scratch = ResultPaths.at(fast_path / "result.zarr").scratch
    monkeypatch.setattr("oocattn.pipelines.session.bytes_in", lambda path: 12345 if path == scratch else 0)
    monkeypatch.setattr("oocattn.pipelines.watch.series.FIRST_WIDTH", 0.002)  # so that a short run has many
    monkeypatch.setattr(Lane, "attend", lambda lane, turn: failing(lane, turn))

    def look(event: Event) -> None:
        recorder(event)
        count = len(recorder.of("attended"))
        if (event.kind == "attended" and count in (5, 20)) or event.kind == "ended":
            before = clock.now()
            seen.append(Look(list(recorder.events), opened(client), before, clock.now()))

    with local_client() as client:
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client, callbacks=[look])
        menu = urlopen(client.dashboard_link.replace("oocattn", "status"), timeout=30).read().decode()
        assert menu.index('href="oocattn"') < menu.index('href="status"')
    assert [len(each.of("recovered")) for each in seen] == [0, 1, 1]
    return seen


def test_the_numbers_of_the_page_are_those_of_the_events(plan: Plan, looks: list[Look]) -> None:
    for look in looks:
        assert_progress(plan, look)
        assert_rates(look)
        assert_lanes(look)
        assert_resources(look)
        log = text(look.document, "log")
        for event in look.of("recovered"):
            assert f"recovered: {event.error}" in log
            assert "<Input/output error>" in log
        assert ("recovered" in log) == bool(look.of("recovered"))


def assert_progress(plan: Plan, look: Look) -> None:
    """Share and chunk pairs."""
    assert f"{look.done:,} of 26 subproblems" in text(look.document, "headline")
    if look.of("ended"):
        assert "finished in " in headline(look.document)
        assert source(look.document, "strip")["share"][0].ravel().tolist() == [1.0, 1.0]
        return
    assert f"running: {look.done / 26:.1%}, " in headline(look.document)
    if not look.of("recovered"):  # then what was staged is staged again
        attended, staged = ({(e.head_group, e.index) for e in look.of(kind)} for kind in ("attended", "staged"))
        division = plan.division_of(0)
        for name, these in (("done", attended), ("in_flight", staged - attended)):
            expected = np.zeros((13, 13), int)
            for group, index in these:
                for block in division.subproblem(index).blocks if group == 0 else ():
                    expected[block.query_chunk, list(block.key_chunks)] = 1
            assert source(look.document, "matrix")[name][0].tolist() == expected.tolist()


def assert_rates(look: Look) -> None:
    """What was done up to the end of each bin but the last, which may be filled in part."""
    rates, (started,) = source(look.document, "rates"), look.of("started")
    edges = np.asarray(rates["seconds"])[:-1]
    assert len(edges) >= 5
    for name in ("tokens", "read", "written"):
        done = np.zeros(len(edges))
        for amount, start, stop in look.amounts(name):
            done += amount * np.clip((started.start + edges - start) / (stop - start), 0, 1)
        assert np.cumsum(np.asarray(rates[name])[:-1] * edges[0]) == pytest.approx(done, rel=2e-3, abs=2e-3 * max(done))
    flops = np.asarray(rates["flops"]) / np.maximum(1e-9, rates["tokens"])
    assert flops[np.asarray(rates["tokens"]) > 0] == pytest.approx(4 * 8 * 2 * 131 / 2, rel=2e-3)  # D = 8, 2 heads


def assert_lanes(look: Look) -> None:
    """How busy each resource of the lane was."""
    lanes = source(look.document, "lanes")
    spans = [span for event in look.events for span in getattr(event, "spans", ())]
    seconds = max(span.stop for span in spans) - look.of("started")[0].start
    assert lanes["dw"] == pytest.approx([seconds])
    (axis,) = [each for each in look.document.select({"type": LinearAxis}) if each.major_label_overrides]
    labels = list(axis.major_label_overrides.values())
    names = [name for name in RESOURCES if any(span.resource == name for span in spans)]
    assert len(labels) == len(names)
    for name, label, cells in zip(names, labels, lanes["busy"][0], strict=True):
        share = busy_seconds([span for span in spans if span.resource == name]) / seconds
        assert cells.mean() == pytest.approx(share, abs=0.006)
        assert label == f"0: {name} {round(share, 4):.0%}"


def assert_resources(look: Look) -> None:
    """Memory, scratch, and when something was last saved."""
    said = text(look.document, "resources")
    memory = [event.memory for event in look.of("attended") if event.memory][-1]
    assert f"host memory: {format_bytes(max(0, memory.host))}, planned peak" in said
    if look.of("ended"):
        assert "scratch on disk: 0 B" in said
        assert "everything is saved" in said
        return
    assert f"scratch on disk: {format_bytes(12345)}" in said
    (age,) = re.findall(r"last saved ([0-9.e-]+) s ago", said)
    assert look.before - look.saved - 0.01 <= float(age) <= look.after - look.saved + 0.01


def test_the_page_of_a_callers_cluster_stays_after_the_run(plan: Plan, fast_path: Path) -> None:
    options = {"n_workers": 1, "threads_per_worker": 4, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(processes=False, **options) as cluster, Client(cluster, set_as_default=False) as client:
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client)
        assert "finished in " in headline(opened(client))
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "other.zarr", client)
        first = runs.find_runs(cluster.scheduler).names[-1]
        assert "other.zarr" in headline(opened(client))
        assert "result.zarr" in headline(opened(client, first))
        assert f'href="?run={first}"' in headline(opened(client))


def test_a_run_goes_on_where_the_callers_cluster_has_no_dashboard(
    plan: Plan, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"n_workers": 1, "threads_per_worker": 4, "memory_limit": 0, "dashboard_address": None, "silence_logs": False}
    with (
        caplog.at_level(logging.INFO, "oocattn"),
        LocalCluster(processes=False, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client)
    said = [record.getMessage() for record in caplog.records if "its page" in record.getMessage()]
    assert said == ["the run goes on without its page in Dask's dashboard: the scheduler has no dashboard"]


def test_a_scheduler_remembers_the_last_runs_alone() -> None:
    known = runs.Runs()
    for number in range(30):
        known.take(f"run-{number}", {"number": number})
    assert known.names == [f"run-{number}" for number in range(29, 29 - runs.MOST_RUNS, -1)]
    found = known.find()
    assert found is not None
    assert found[0] == {"number": 29}


def test_the_page_says_when_data_stopped_coming(plan: Plan) -> None:
    board = Board("<result>.zarr")
    board(make_event("started", plan=plan, left=26))
    record = board.record()
    assert "no data" not in page_words.headline(record, 1.0)
    assert f"no data for 33 s: {record['process']} is stopped" in page_words.headline(record, 33.0)
    board(make_event("failed", error="<script>"))
    said = page_words.headline(board.record(), 33.0) + page_words.log(board.record())
    assert "no data" not in said
    assert "&lt;script&gt;" in said
    assert "<script>" not in said
    assert "<result>" not in said


def test_the_page_of_a_run_that_has_ended_stays_until_the_next_one(plan: Plan, fast_path: Path) -> None:
    with local_client() as client:
        url = client.dashboard_link
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client)
    page = urlopen(url, timeout=30).read().decode()
    assert "finished in " in page
    elsewhere = Request(url, headers={"Host": "evil.example"})
    with pytest.raises(HTTPError, match="403"):
        urlopen(elsewhere, timeout=30)
    with local_client(), pytest.raises(OSError, match="refused"):
        urlopen(url, timeout=30)


@pytest.mark.parametrize(("decomposition", "asked"), [("cqs", {}), ("strips", {"window_size": (1_000, 0)})])
def test_updates_of_the_page_of_ten_thousand_subproblems_stay_small(decomposition: str, asked: dict[str, Any]) -> None:
    problem, budgets = a_problem(1 << 24, **asked), {"device_memory": 1 << 60, "host_memory": 1 << 60}
    plan = make_plan(problem, MACHINE, **budgets, chunks=9_507, decomposition=decomposition)
    assert 9_000 < plan.subproblems < 11_000
    board, page, document, changes = Board("result.zarr"), RunPage(), Document(), Changes()
    document.add_root(page.root)
    document.on_change_dispatch_to(changes)
    board(make_event("started", 0, 0, plan=plan, left=plan.subproblems))
    for number, index in enumerate(plan.division_of(0).indices, 1):
        task = {"index": index, "worker": str(number % 20), "bytes": 1 << 20, "pairs": 1 << 20}
        for kind, resource in (("staged", "read"), ("attended", "compute"), ("written", "write")):
            start = number + 0.1 * len(resource)
            spans = (Span(cast(Resource, resource), start, start + 0.3),)
            names = {field.name for field in fields(getattr(oocattn, kind.capitalize()))}
            board(make_event(kind, start, start + 0.3, spans=spans, **{k: v for k, v in task.items() if k in names}))
        if number % 1_000 == 0:
            board(make_event("stalled", number, number, reason="slow " * 100))
            page.update(board.record(), 0.0, [])
            assert 1_000 < changes.take_bytes() <= 200_000
    assert 1 / UPDATE_SECONDS <= 4


class Changes:
    """What a document sends to a browser."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def _document_patched(self, event: Any) -> None:
        self._events.append(event)

    def take_bytes(self) -> int:
        """The bytes of a message with the changes since the last one."""
        message = patch_doc.create(self._events)
        self._events.clear()
        texts = len(message.header_json) + len(message.metadata_json) + len(message.content_json)
        return texts + sum(len(each.to_bytes()) for each in message.buffers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_the_page_at_every_stage(
    plan: Plan, fast_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 10%, with a fault, at 60% and after the end: pictures of which none is blank, and no error of a script."""
    recorder, failing = Recorder([]), FailingOnce(9)
    pictures = {name: tmp_path / f"{name}.png" for name in ("early", "fault", "late", "ended")}
    monkeypatch.setattr(Lane, "attend", lambda lane, turn: failing(lane, turn))

    def look(event: Event) -> None:
        recorder(event)
        if event.kind not in ("attended", "recovered"):
            return
        done = Look(recorder.events, Document(), 0, 0).done
        if event.kind == "recovered":
            assert (
                look_at(url, f"{shown('log')}.includes('recovered: subproblem 9 of head group 0')", pictures["fault"]) == []
            )
        elif name := {3: "early", 16: "late"}.get(done):
            assert look_at(url, f"{shown('headline')}.includes('{done} of 26')", pictures[name]) == []

    with local_client() as client:
        url = client.dashboard_link
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client, callbacks=[look])
    assert look_at(url, f"{shown('headline')}.includes('finished in ')", pictures["ended"]) == []
    assert all(picture.stat().st_size > 20_000 for picture in pictures.values())
