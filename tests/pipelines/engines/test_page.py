"""The page of a run in Dask's dashboard: its numbers are those of the events, whoever's cluster it is."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from bokeh.client import pull_session
from bokeh.document import Document
from browser import look_at
from distributed import Client, LocalCluster
from support import Recorder, carry_out, make_event, normal_arrays, plan_for, write_dataset

from oocattn import Event, Plan
from oocattn.pipelines.engines.dask import page_words, runs
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.watch.board import Board

HEADLINE = "(window.Bokeh?.documents[0]?.get_model_by_name('headline')?.text ?? '')"


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


def run_while_looking(client: Client, plan: Plan, folder: Path) -> tuple[Recorder, list[tuple[int, Document]]]:
    """The events of a run, and what the page showed after some of them."""
    recorder, seen = Recorder([]), []

    def look(event: Event) -> None:
        recorder(event)
        if event.kind == "attended" and len(recorder.of("attended")) in (5, 20):
            seen.append((len(recorder.events), opened(client)))

    carry_out(plan, folder / "dataset.zarr", folder / "result.zarr", client, callbacks=[look])
    return recorder, seen


def test_the_page_of_a_cluster_of_our_own_shows_what_the_events_said(plan: Plan, fast_path: Path) -> None:
    with local_client() as client:
        recorder, seen = run_while_looking(client, plan, fast_path)
        assert len(seen) == 2
        for count, document in seen:
            attended = [event for event in recorder.events[:count] if event.kind == "attended"]
            assert f"{len(attended):,} of 26 subproblems" in headline(document)
            group = 0 if len(attended) < 13 else 1
            of_group = [event.index for event in attended if event.head_group == group]
            division = plan.division_of(group)
            pairs = sum(len(block.key_chunks) for index in of_group for block in division.subproblem(index).blocks)
            assert source(document, "matrix")["done"][0].sum() == pairs
        document = opened(client)
        assert "finished in " in headline(document)
        assert source(document, "strip")["share"][0].ravel().tolist() == [1.0, 1.0]
        rates = source(document, "rates")
        tokens = np.diff([0.0, *rates["seconds"]]) @ rates["tokens"]
        assert 0 < tokens <= 130 * 1.5  # the last bin may be partly filled
        menu = urlopen(client.dashboard_link.replace("oocattn", "status"), timeout=30).read().decode()
        assert menu.index('href="oocattn"') < menu.index('href="status"')


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_the_page_at_every_stage(plan: Plan, fast_path: Path, tmp_path: Path) -> None:
    """At 10%, at 60% and after the end: pictures of which none is blank, and no error of a script."""
    recorder, pictures = Recorder([]), {name: tmp_path / f"{name}.png" for name in ("early", "late", "ended")}

    def look(event: Event) -> None:
        recorder(event)
        stage = {3: "early", 16: "late"}.get(len(recorder.of("attended")), "") if event.kind == "attended" else ""
        if stage:
            shown = f"{HEADLINE}.includes('{len(recorder.of('attended'))} of 26')"
            assert look_at(url, shown, pictures[stage]) == []

    with local_client() as client:
        url = client.dashboard_link
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client, callbacks=[look])
    assert look_at(url, f"{HEADLINE}.includes('finished in ')", pictures["ended"]) == []
    assert all(picture.stat().st_size > 20_000 for picture in pictures.values())
