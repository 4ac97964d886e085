"""Without a terminal, the log says where the dashboard is, and each minute how far the run is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Status, clock
from oocattn.cli.main import main
from oocattn.pipelines.watch import progress_log
from oocattn.pipelines.watch.progress_log import LOG_SECONDS, ProgressLog

RUNNING = Status("running", 10, 2, tokens=100, rate=5.0, seconds=4.0, seconds_left=16.0, dashboard="http://here/status")


def test_a_line_each_minute_after_the_dashboards_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="oocattn")
    now = 1e9
    monkeypatch.setattr(clock, "now", lambda: now)
    log = ProgressLog()
    for _ in range(200):
        log(RUNNING)
        now += LOG_SECONDS / 60
    line = "running: 2 of 10 subproblems, 20 of 100 tokens (20%) after 4 s, 5 tokens/s; about 16 s left"
    assert [record.getMessage() for record in caplog.records] == ["dashboard http://here/status", line, line, line]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


@pytest.mark.parametrize(
    ("option", "seconds", "expected"),
    [([], 0.0, "dashboard none\n"), ([], 3600.0, ""), (["--no-progress"], 0.0, "")],
    ids=["long", "short", "unwanted"],
)
def test_the_command_shows_it_without_a_terminal(
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    seconds: float,
    expected: str,
) -> None:
    monkeypatch.setattr(progress_log, "LOG_SECONDS", seconds)
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(130))
    logger = logging.getLogger("oocattn")
    before = logger.level, logger.handlers[:]
    assert main(["run", str(dataset), str(fast_path / "result.zarr"), "--engine", "inline", *option]) == 0
    said = capsys.readouterr().err
    assert said.startswith(expected)
    assert ("dashboard" in said) == bool(expected)
    assert (logger.level, logger.handlers) == before


def test_python_shows_a_bar_where_it_is_asked_for(fast_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, result = write_dataset(fast_path / "dataset.zarr", normal_arrays(130)), fast_path / "result.zarr"
    carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "other.zarr")
    assert "subproblems" not in capsys.readouterr().err
    oocattn.attention(dataset, result, engine="inline", chunks=7, progress=True)
    assert "7/7 subproblems" in capsys.readouterr().err
