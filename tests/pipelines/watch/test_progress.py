"""The progress bar: what it says of a run at any moment, and that nothing else is printed into its line."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support import make_event

from oocattn import clock
from oocattn.cli.printing import Printing
from oocattn.log import logger
from oocattn.pipelines.watch import progress
from oocattn.pipelines.watch.progress import DRAWING_SECONDS, ProgressBar

PLAN = SimpleNamespace(problem=SimpleNamespace(out_rows=1000, batch=2, pairs=2000), subproblems=20, seconds=200.0)
"""A subproblem is 100 tokens, 100 pairs and, as planned, 10 s."""


class Watched:
    """A progress bar on a terminal of its own, at times that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = io.StringIO()
        self.now = 1e9
        monkeypatch.setattr(clock, "now", lambda: self.now)
        self._bar = ProgressBar()

    def see(self, kind: Any, at: float, **detail: object) -> str:
        """What is on the line after an event at so many seconds."""
        self.now = 1e9 + at
        of_kind = {"pairs": 100} if kind == "attended" else {}
        self._bar(make_event(kind, self.now, self.now, **of_kind, **detail))
        return self.lines()[-1]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        lines = self.written.getvalue().split("\n")
        return [next((part for part in reversed(line.split("\r")) if part.strip()), "").rstrip() for line in lines]

    def begin(self, left: int = 20) -> str:
        return self.see("started", 0, plan=PLAN, left=left, pairs_left=100 * left, dashboard="")

    def end(self) -> None:
        """tqdm counts bars that are not closed."""
        self.see("failed", 1e6)


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched(monkeypatch)
    yield watched
    watched.end()


@pytest.fixture
def terminal(bar: Watched, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called in the test itself: pytest puts another standard error in place for it."""
    return lambda: monkeypatch.setattr(sys, "stderr", bar.written)


def test_the_bar_says_what_is_done_and_the_time_left(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    assert "0/20 subproblems" in bar.begin()
    assert bar.see("attended", 10).endswith("1/20 subproblems, 10 s, 10 tokens/s, about 3 min left")
    assert "5%" in bar.lines()[-1]
    assert bar.see("progressed", 15, worker="a", pairs=50).endswith("1/20 subproblems, 15 s, 10 tokens/s, about 3 min left")
    assert re.match(r"\s*8%", bar.lines()[-1])  # 1.5 of 20


def test_the_rate_of_a_resumed_run_is_that_of_this_process(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    assert "15/20 subproblems" in bar.begin(left=5)
    assert bar.see("attended", 10).endswith("16/20 subproblems, 10 s, 10 tokens/s, about 40 s left")


def test_work_that_was_lost_is_counted_when_it_is_done_again(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    bar.begin(left=5)
    bar.see("attended", 10)
    assert "10/20 subproblems, 12 s" in bar.see("recovered", 12, left=10, pairs_left=1000)
    assert bar.see("attended", 20).endswith("11/20 subproblems, 20 s, 10 tokens/s, about 90 s left")


def test_fast_subproblems_are_not_all_drawn_but_the_last_one_is(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    bar.begin()
    for number in range(1, 21):
        bar.see("attended", number * DRAWING_SECONDS / 10)
    assert bar.written.getvalue().count("\r") < 8
    bar.see("ended", 0.5)
    assert bar.lines()[-2].endswith("20/20 subproblems, 0.5 s, 10,000 tokens/s")


def test_a_line_of_the_log_is_printed_above_the_bar(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    bar.begin()
    bar.see("attended", 10)
    handler = logging.StreamHandler(bar.written)
    logger.addHandler(handler)
    try:
        logger.warning("ending: something is saved")
        bar.see("failed", 12)
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    *_, message, shown, after, _ = bar.lines()
    assert message == "ending: something is saved"
    assert "1/20 subproblems" in shown
    assert after == "afterwards"


def test_output_beside_the_bar_begins_on_a_line_of_its_own(bar: Watched, terminal: Callable[[], None]) -> None:
    terminal()
    with Printing():
        bar.begin()
        print("a warning of a library", file=sys.stderr)
        bar.see("attended", 10)
        bar.see("ended", 20)
        print("the report", file=sys.stderr)
    assert [line for line in bar.lines() if not re.search("subproblems", line)] == [
        "a warning of a library",
        "the report",
        "",
    ]


def test_the_bar_is_drawn_between_events_too(
    bar: Watched, terminal: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.002)
    terminal()
    bar.begin()
    bar.see("attended", 10)
    bar.now += 5
    until = time.monotonic() + 60
    while " 15 s," not in bar.lines()[-1]:
        assert time.monotonic() < until, "the bar does not move by itself"
        time.sleep(0.002)
