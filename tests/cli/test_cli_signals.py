"""Signals and time limits end a command with their exit codes, and what was done is on disk."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from small import SMALL

import oocattn
from oocattn import clock
from oocattn.cli import main as cli

PROGRESS_BAR = "oocattn.pipelines.watch.progress.ProgressBar"


def started(dataset, result, pause=0.05):
    """A run in a process of its own that has attended something, and has a second of pauses before it."""
    process = warm.command("run", dataset, result, "--chunks", "13", pause=pause)
    while not oocattn.status(result).subproblems_done:
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, "interrupted"), (signal.SIGUSR1, 75, "time limit reached (SIGUSR1)")]
)
def test_a_signal_ends_a_run_in_two_lines_and_it_can_be_resumed(dataset, fast_path, number, code, words):
    result = str(fast_path / "result.zarr")
    process = started(dataset, result)
    if number == signal.SIGUSR1:
        process.send_signal(number)  # and another one, which changes nothing
        time.sleep(0.05)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == code
    *warned, first, last = printed.splitlines()
    assert all(line.startswith("this plan spends ") for line in warned), printed  # it has many tasks
    assert first.startswith("ending: what is in flight is finished and saved first, which may take ")
    assert last == f"oocattn: {words}; go on with: oocattn resume {result}"
    assert oocattn.status(result).state == "interrupted"
    assert not Path(result).exists()
    assert cli.main(["resume", result]) == 0
    assert cli.main(["verify", result, "--rows", "4"]) == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 75)]
)
def test_a_signal_has_its_exit_code_before_a_run_and_in_it(dataset, result, number, code, monkeypatch, capsys):
    handlers, numbers = [signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGUSR1)], [number]
    with monkeypatch.context() as patched:
        patched.setattr(oocattn, "plan", lambda *_, **__: signal.raise_signal(number))
        assert cli.main(["plan", dataset]) == code
    monkeypatch.setattr(
        PROGRESS_BAR,
        lambda: lambda event: event.kind == "staged" and numbers and signal.raise_signal(numbers.pop()),  # a second ends it
    )
    assert cli.main(["run", dataset, result, "--chunks", "7", "--progress"]) == code
    assert f"go on with: oocattn resume {result}" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGUSR1)] == handlers
    assert cli.main(["resume", result]) == 0


def test_what_a_run_in_a_store_goes_on_with_is_told_without_its_values(monkeypatch, capsys):
    dataset, result = "memory://signals/qkv.zarr", "memory://signals/out.zarr"
    more = ["--scratch", "store", "--lock", "none", "--storage-option", "password=hunter2"]
    assert cli.main(["synth", dataset, *SMALL]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(PROGRESS_BAR, lambda: lambda event: event.kind == "staged" and signal.raise_signal(signal.SIGUSR1))
        assert cli.main(["run", dataset, result, *more, "--chunks", "7", "--engine", "inline", "--progress"]) == 75
    printed = capsys.readouterr().err
    command = f"go on with: oocattn resume {result} --dataset {dataset} --scratch store --lock none"
    assert printed.endswith(f"{command} --storage-option password=... (with the values of the storage options)\n")
    assert "hunter2" not in printed
    assert cli.main(["resume", result, *more, "--dataset", dataset, "--engine", "inline"]) == 0


def test_a_warning_that_time_is_short_comes_too_late_for_a_committed_result(dataset, result, monkeypatch):
    monkeypatch.setattr(
        PROGRESS_BAR,
        lambda: lambda event: event.kind == "committed" and signal.raise_signal(signal.SIGUSR1),
    )
    assert cli.main(["run", dataset, result, "--chunks", "1", "--progress"]) == 0


def test_a_run_under_nohup_goes_on_when_its_terminal_is_gone(dataset, result):
    command = [sys.executable, "-m", "oocattn", "run", dataset, result, "--chunks", "31"]
    process = subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not oocattn.status(result).subproblems_done:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert "finished" in process.communicate(timeout=60)[0]
    assert process.returncode == 0


def test_a_time_limit_ends_a_run_with_its_own_code_and_it_can_be_resumed(dataset, result, monkeypatch, capsys):
    """Of a run of which every subproblem takes a second more, by the clock of runs."""
    real, skipped = clock.now, []
    monkeypatch.setattr(clock, "now", lambda: real() + len(skipped))
    monkeypatch.setattr(
        PROGRESS_BAR,
        lambda: lambda event: event.kind == "attended" and skipped.append(event),
    )
    monkeypatch.setattr(clock, "process_age", lambda: 30.0)  # the limit is the whole command's
    assert cli.main(["run", dataset, result, "--chunks", "31", "--time-limit", "1m10s", "--progress"]) == 75
    assert len(skipped) < 40
    done = r"time limit reached: \d+ of 62 subproblems are done, not counting those in flight"
    printed = capsys.readouterr().err
    assert re.search(rf"^oocattn: {done}; go on with: oocattn resume {result}$", printed, re.MULTILINE), printed
    assert 0 < oocattn.status(result).subproblems_done < 62
    assert cli.main(["status", result]) == 0
    assert re.search(r"interrupted: \d+ of 62 subproblems are on disk, .* tokens/s\n.* last saved ", capsys.readouterr().out)
    assert cli.main(["resume", result]) == 0


def test_a_second_signal_ends_a_run_at_once(dataset, result):
    """In a run whose subproblems take five seconds."""
    process = started(dataset, result, pause=5.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=3.5) == -signal.SIGINT


def test_a_command_that_has_ended_is_not_killed_by_the_warning_of_a_time_limit() -> None:
    lines = (
        "import atexit, os, signal, sys",
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGUSR1))",
        "sys.argv = ['oocattn', '--version']",
        "from oocattn.__main__ import run",
        "raise SystemExit(run())",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, capture_output=True).returncode == 0
