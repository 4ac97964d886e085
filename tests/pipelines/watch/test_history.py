"""How plans did is kept and shown, and never in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import oocattn
from oocattn.pipelines.watch import history
from oocattn.pipelines.watch.history import MOST_RUNS, describe_history, keep_run, read_history


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "oocattn" / "predictions.json"


def test_past_plans_are_compared_with_their_runs(kept: Path) -> None:
    assert describe_history("cpu") == ""
    for predicted in (9.0, 9.7, 10.0):
        keep_run("cpu", predicted, 10.0)
    assert describe_history("cpu") == "plans here were 3% low over 3 runs"
    keep_run("cuda", 12.0, 10.0)
    keep_run("cuda", 1.0, 0.5)  # too short to tell
    assert describe_history("cuda") == "plans here were 20% high over 1 run"
    kept.write_text(kept.read_text().replace(history.platform.node(), "elsewhere"))
    assert describe_history("cpu") == ""


def test_the_history_is_bounded(kept: Path) -> None:
    for number in range(MOST_RUNS + 10):
        keep_run("cpu", 1.0 + number, 2.0)
    runs = read_history(kept).runs
    assert len(runs) == MOST_RUNS
    assert runs[-1].predicted == MOST_RUNS + 10
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": [[1]]}', '{"runs": 1e999}', "x" * 100_000, '{"runs": []}'])
def test_a_damaged_history_is_as_if_there_was_none(kept: Path, content: str) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    assert describe_history("cpu") == ""
    keep_run("cpu", 3.0, 2.0)
    assert describe_history("cpu") == "plans here were 50% high over 1 run"


def test_a_place_that_takes_no_file_keeps_nothing(kept: Path) -> None:
    kept.parent.mkdir()
    os.mkfifo(kept)
    assert describe_history("cpu") == ""
    kept.unlink()
    kept.mkdir()
    keep_run("cpu", 3.0, 2.0)
    assert describe_history("cpu") == ""
    assert not list(kept.iterdir())


def test_a_run_is_kept_once(kept: Path, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LEAST_SECONDS", 0.0)
    report = oocattn.attention(dataset, result, engine="inline").report
    assert report is not None
    (run,) = json.loads(kept.read_text())["runs"]
    assert (run["predicted"], run["seconds"]) == (report.predicted_seconds, report.seconds)
    oocattn.attention(dataset, result, engine="inline")  # is there already
    assert len(read_history(kept).runs) == 1
