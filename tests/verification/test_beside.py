"""A call in a process of its own: what it says, what it takes, and when it ends or cannot be made there."""

from __future__ import annotations

import logging
import signal
import sys
from functools import partial
from pathlib import Path

import called
import pytest
import warm
from called import serving, wait_until

from oocattn.verification import beside
from oocattn.verification.beside import ProcessBeside


def test_a_process_ends_when_the_one_that_began_it_is_killed(tmp_path: Path) -> None:
    script = """
import sys, time, called
from functools import partial
from pathlib import Path
from oocattn.verification.beside import ProcessBeside
with ProcessBeside() as beside:
    beside.begin(partial(called.wait, Path(sys.argv[1])), 0)
    time.sleep(600)
"""
    process = warm.script(script, str(tmp_path / "begun"))
    wait_until((tmp_path / "begun").exists)
    (found,) = serving(process.pid)
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not found.is_running())


def test_what_a_process_says_is_said_here(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessBeside[str]() as process:
        process.begin(partial(called.say, "so"), 0)
        with pytest.warns(UserWarning, match="warned: so"):
            assert process.answer() == "so"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, "logged: so")]
    assert capfd.readouterr() == ("", "")


def test_a_call_that_raises_or_cannot_be_sent_is_to_be_made_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oocattn")
    for call, words in ((called.fail, "failed: ValueError: it cannot be done"), (lambda: None, "no process could be had")):
        caplog.clear()
        with ProcessBeside[None]() as process:
            process.begin(call, 0)
            assert process.answer() is None
        assert words in caplog.text
    for executable in ("", "/nothing/is/here", "/bin/true", "/bin/cat"):
        monkeypatch.setattr(sys, "executable", executable)
        with ProcessBeside[str]() as another:
            another.begin(partial(called.say, "nothing"), 0)
            assert another.answer() is None


def test_where_no_thread_can_be_begun_the_call_is_to_be_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(beside, "begin_call", refuse)
    with ProcessBeside[str]() as process:
        process.begin(partial(called.say, "nothing"), 0)
        assert (process.held, process.answer()) == (0, None)
    wait_until(lambda: not serving())
