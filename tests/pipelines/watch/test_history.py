"""How plans did is kept and shown, and never in the way."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support import GENEROUS, MACHINE, a_problem

import oocattn
from oocattn.pipelines.watch import history
from oocattn.pipelines.watch.history import MOST_RUNS, describe_history, keep_run, read_history
from oocattn.planning.candidates import make_plan
from oocattn.planning.plan import Plan

PLAN = make_plan(a_problem(1000), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)


def predicting(seconds: float, plan: Plan = PLAN, **machine: str) -> Plan:
    return replace(plan, seconds=seconds, machine=replace(plan.machine, **machine))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "oocattn" / "predictions.json"


def test_past_plans_are_compared_with_their_runs(kept: Path) -> None:
    assert describe_history(PLAN) == ""
    for predicted in (9.0, 9.7, 10.0):
        keep_run(predicting(predicted), 10.0)
    assert describe_history(PLAN) == "plans here were 3% low over 3 runs"
    for other in ({"device": "cuda"}, {"kernel": "reference"}):
        keep_run(predicting(12.0, **other), 10.0)
        keep_run(predicting(1.0, **other), 0.5)  # too short to tell
        assert describe_history(predicting(1.0, **other)) == "plans here were 20% high over 1 run"
    kept.write_text(kept.read_text().replace(history.platform.node(), "elsewhere"))
    assert describe_history(PLAN) == ""


def test_many_short_runs_do_not_drown_a_long_one(kept: Path) -> None:
    for _ in range(10):
        keep_run(predicting(3.0), 6.0)
    keep_run(predicting(101.0), 100.0)
    assert describe_history(PLAN) == "plans here were 1% high over 11 runs"


def test_runs_that_end_at_the_same_time_are_all_kept(kept: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keep_run(predicting(1.0 + number), 10.0), range(40)))
    assert {run.predicted for run in read_history(kept).runs} == {1.0 + number for number in range(40)}


def test_a_file_system_without_locks_keeps_runs(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # as NFS does for a folder

    monkeypatch.setattr(history.fcntl, "flock", refuse)
    keep_run(predicting(9.0), 6.0)
    assert describe_history(PLAN) == "plans here were 50% high over 1 run"


def test_another_process_that_does_not_end_holds_nobody_up(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PATIENCE", 0.02)
    kept.parent.mkdir()
    with history._locked(kept.parent):
        keep_run(PLAN, 10.0)
    assert not kept.exists()


def test_the_history_is_bounded(kept: Path) -> None:
    for number in range(MOST_RUNS + 10):
        keep_run(predicting(1.0 + number), 6.0)
    runs = read_history(kept).runs
    assert len(runs) == MOST_RUNS
    assert runs[-1].predicted == MOST_RUNS + 10
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": [[1]]}', '{"runs": 1e999}', "x" * 100_000, '{"runs": []}'])
def test_a_damaged_history_is_as_if_there_was_none(kept: Path, content: str) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    assert describe_history(PLAN) == ""
    keep_run(predicting(9.0), 6.0)
    assert describe_history(PLAN) == "plans here were 50% high over 1 run"


def test_a_place_that_takes_no_file_keeps_nothing(kept: Path) -> None:
    kept.parent.mkdir()
    os.mkfifo(kept)
    assert describe_history(PLAN) == ""
    kept.unlink()
    kept.mkdir()
    keep_run(predicting(9.0), 6.0)
    assert describe_history(PLAN) == ""
    assert not list(kept.iterdir())


def test_a_run_is_kept_once(kept: Path, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LEAST_SECONDS", 0.0)
    report = oocattn.attention(dataset, result, engine="inline").report
    assert report is not None
    (run,) = json.loads(kept.read_text())["runs"]
    assert (run["predicted"], run["seconds"]) == (report.predicted_seconds, report.seconds - report.waited)
    oocattn.attention(dataset, result, engine="inline")  # is there already
    assert len(read_history(kept).runs) == 1
