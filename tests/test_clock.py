"""Durations, rates and limits by a clock that nobody sets: whatever the wall clock says, a run and its figures are right."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Recorder, plan_for
from tornado.ioloop import IOLoop

import oocattn
from oocattn import Event, clock
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.pipelines.existing import Request
from oocattn.pipelines.session import run_plan
from oocattn.pipelines.watch.progress import ProgressBar
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths

DECADE = 3e8


def test_moments_are_seconds_since_the_epoch_and_do_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.now() == pytest.approx(time.time(), abs=60)
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock.now() - before < 60


def test_a_rate_without_time_is_none_at_all() -> None:
    assert clock.rate(10, 4) == 2.5
    assert clock.rate(10, 0) == 0


def test_the_age_of_a_process_counts_from_its_start() -> None:
    script = f"import runpy, time; time.sleep(0.3); print(runpy.run_path({clock.__file__!r})['process_age']())"
    began = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert 0.3 < float(printed) < time.monotonic() - began + 0.02  # the system counts in hundredths


@pytest.mark.parametrize("stat", [None, "", "17 (a) S 1", "17 (x) S " + "0 " * 40])
def test_where_the_system_does_not_say_it_counts_from_the_import(
    stat: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stat is not None:
        (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(clock, "Path", lambda _: tmp_path / "stat")
    assert 0 < clock.process_age() < 3600


def set_by(seconds: float) -> Callable[[pytest.MonkeyPatch], None]:
    def set_clock(patched: pytest.MonkeyPatch) -> None:
        real = time.time
        patched.setattr(IOLoop, "time", lambda _: real())  # Dask keeps `time.time` from before: both must agree
        patched.setattr(time, "time", lambda: real() + seconds)

    return set_clock


def stop(patched: pytest.MonkeyPatch) -> None:
    """The clock of runs stands still."""
    moment = clock.now()
    patched.setattr(clock, "now", lambda: moment)


@pytest.mark.parametrize("change", [set_by(DECADE), set_by(-DECADE), stop], ids=["forward", "back", "standing"])
def test_a_run_is_right_when_the_clock_is_set_meanwhile(
    dataset: Path,
    result: Path,
    change: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("oocattn.pipelines.watch.status_file.WRITING_SECONDS", 0.0)
    plan, paths = plan_for(dataset, chunks=7), ResultPaths.at(result)
    recorder, statuses = Recorder([]), []

    with monkeypatch.context() as patched:

        def look(event: Event) -> None:
            if event in recorder.of("staged")[:1]:  # once: what is set by a clock that was set would set Dask's too
                change(patched)
            if event.kind == "attended":
                statuses.append(oocattn.status(result))

        listeners = [recorder, ProgressBar(), look]
        until = clock.now() + 3600
        request = Request(plan.problem, Dataset.open(dataset), paths)
        report = run_plan(plan, request, InlineEngine(1), callbacks=listeners, until=until).report
    assert 0 <= report.seconds < 60
    assert 0 <= report.compute_busy <= 1
    assert "compute      busy" in str(report)
    assert len(statuses) == 7
    assert all(0 <= status.seconds < 60 and 0 <= status.seconds_left < 60 for status in statuses)
    assert all("last saved" not in str(status) or "last saved 0" in str(status) for status in statuses)
    for event in recorder.events:
        assert 0 <= event.stop - event.start < 60
        assert all(0 <= span.stop - span.start < 60 for span in getattr(event, "spans", ()))
    assert "7/7 subproblems" in capsys.readouterr().err
