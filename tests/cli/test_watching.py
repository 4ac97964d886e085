"""`status --watch` draws the status until the run ends, and its exit code says how that was."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import asdict
from json import dumps
from pathlib import Path

import pytest
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, Status
from oocattn.cli.main import main
from oocattn.cli.printing import Printing
from oocattn.cli.watching import watch

RUNNING = Status("running", 10, holder="somebody", dashboard="http://127.0.0.1:1/status")


class Terminal(io.StringIO):
    """A stream that somebody sees."""

    def isatty(self) -> bool:
        return True


class Closed(Terminal):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_each_status_is_drawn_in_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    seen = iter([RUNNING, Status("running", 10, 3, holder="somebody", stalled="no reason"), Status("finished", 10, 10)])
    assert watch(lambda: next(seen), 0.0).state == "finished"
    text = terminal.getvalue()
    assert text.index("running: 0 of 10") < text.index("stalled: 3 of 10") < text.index("finished")
    assert "\x1b[1A" in text  # up a line
    assert text.endswith("\x1b[?25h")  # the cursor is there again


def test_it_ends_where_nobody_sees_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    looks = []
    with Printing():
        watch(lambda: looks.append(None) or RUNNING, 0.0)
    assert 1 <= len(looks) <= 2


@pytest.mark.parametrize(("ending", "code"), [("finished", 0), ("interrupted", 75), ("none", 1)])
def test_the_exit_code_says_how_the_run_ended(
    fast_path: Path, capsys: pytest.CaptureFixture[str], ending: str, code: int
) -> None:
    dataset, result = write_dataset(fast_path / "dataset.zarr", normal_arrays(130)), fast_path / "result.zarr"

    def stop(event: Event) -> None:
        if event.kind == "attended" and ending == "interrupted":
            raise KeyboardInterrupt

    if ending == "finished":
        carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[stop])
    elif ending == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[stop])
    assert main(["status", str(result), "--watch"]) == code
    out = capsys.readouterr().out
    assert out.startswith(ending)
    moment_or_call = r"last saved .* ago|go on with: .*"
    lines = (re.sub(moment_or_call, "", text) for text in (out, f"{oocattn.status(result)}\n"))
    assert next(lines) == next(lines)  # no line is broken


def test_the_status_of_a_terminal_has_no_markup_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    named = Status("interrupted", 10, error="[bold]odd[/bold] names")
    assert dumps(asdict(watch(lambda: named, 0.0)))
    assert "[bold]odd[/bold] names" in terminal.getvalue()
