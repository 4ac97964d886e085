"""The page of a run in Dask's dashboard: its numbers are those of the events, whoever's cluster it is."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from bokeh.document import Document
from browser import look_at
from distributed import Client, LocalCluster
from looking import Changes, FailingOnce, Look, headline, opened, shown
from support import MACHINE, Recorder, a_problem, carry_out, make_event, normal_arrays, plan_for, write_dataset
from worker_processes import command, start

import oocattn
from oocattn import Event, Plan
from oocattn.pipelines.engines.dask import page_words, runs
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.engines.dask.page import RunPage
from oocattn.pipelines.engines.dask.runs import UPDATE_SECONDS
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.board import Board
from oocattn.pipelines.watch.events import Resource, Span
from oocattn.planning.candidates import make_plan


@pytest.fixture
def plan(fast_path: Path) -> Plan:
    return plan_for(write_dataset(fast_path / "dataset.zarr", normal_arrays(130, kv_heads=2)), chunks=13, causal=True)


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


def test_several_pages_show_one_record() -> None:
    known, made = runs.Runs(), list[int]()

    def source() -> dict[str, Any]:
        made.append(len(made))
        return {"number": made[-1]}

    with known.following(source):
        assert [known.find(most_age=60.0) for _ in range(3)] == [({"number": 0}, pytest.approx(0, abs=60))] * 3
        assert known.find() == ({"number": 1}, pytest.approx(0, abs=60))
    assert made == [0, 1, 2]


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 3e-3, 0.1, 7.0])
def test_updates_take_a_small_share_of_the_time_however_long_one_takes(seconds: float) -> None:
    pause = runs.pause_after(seconds, UPDATE_SECONDS)
    assert pause >= UPDATE_SECONDS
    assert runs.SENDING_COSTS * seconds <= 0.005 * pause


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


def test_memory_above_the_plan_says_that_the_page_itself_is_counted(plan: Plan) -> None:
    board = Board("result.zarr")
    board(make_event("started", 0, 1, plan=plan, left=13))
    record = board.record()
    besides = "with what its processes do besides, such as this page"
    for host in (record["memory"]["host_peak"], record["memory"]["host_peak"] + 1):
        said = page_words.resources({**record, "memory": {**record["memory"], "host": host}})
        assert (besides in said) == (host > record["memory"]["host_peak"])


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
def test_updates_of_the_page_of_ten_thousand_subproblems_stay_small(
    decomposition: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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
            monkeypatch.setattr(document.models, "recompute", pytest.fail)  # a walk through the document: 8 of 10 ms
            assert 1_000 < changes.take_bytes() <= 200_000
    assert 1 / UPDATE_SECONDS <= 4


@pytest.mark.slow
def test_the_page_of_a_scheduler_in_another_process_shows_the_run(plan: Plan, fast_path: Path) -> None:
    """Nothing is given to the scheduler but the software of the run: no preload, no configuration."""
    file = fast_path / "scheduler.json"
    address = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)]
    with ExitStack() as ending:
        start(ending, [sys.executable, "-m", "distributed.cli.dask_scheduler", *address])
        until = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < until, "the scheduler does not start"
            time.sleep(0.1)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            start(ending, command(client.scheduler.address))
            client.wait_for_workers(1, timeout=60)
            recorder = Recorder([])

            def look(event: Event) -> None:
                recorder(event)
                until = time.monotonic() + 60
                while len(recorder.of("attended")) == 5 and "5 of 26 subproblems" not in headline(opened(client)):
                    assert time.monotonic() < until, headline(opened(client))

            carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client, callbacks=[look])
            assert recorder.of("started")[0].dashboard == client.dashboard_link.replace("/status", "/oocattn")
            assert "finished in " in headline(opened(client))


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
