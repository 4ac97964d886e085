"""A progress bar on the terminal: subproblems, tokens per second and the time left."""

from __future__ import annotations

import sys
from typing import cast

from tqdm import tqdm

from oocattn import clock
from oocattn.pipelines.events import Event
from oocattn.plans import Plan
from oocattn.text import printable
from oocattn.units import format_seconds

INTERVAL = 0.1
"""Seconds between two drawings of the bar at least."""


class ProgressBar:
    """A listener that draws a tqdm bar on standard error and prints the dashboard's address above it.

    Its times are by the clock of the run: tqdm's own are by the wall clock, which may be set meanwhile.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._tokens_each = 0.0
        self._start = self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        if event.kind == "started":
            self._begin(event)
        elif self._bar is not None and event.kind == "mended":
            self._bar.n = self._bar.total - cast(int, event.detail["left"])
        elif self._bar is not None and event.kind == "attended":
            self._bar.n += 1
            if clock.now() - self._drawn >= INTERVAL:
                self._draw(self._bar)
        elif self._bar is not None and event.kind in ("failed", "ended"):
            self._draw(self._bar)
            self._bar.close()
            self._bar = None

    def _begin(self, event: Event) -> None:
        plan = cast(Plan, event.detail["plan"])
        if event.detail["dashboard"]:
            tqdm.write(f"dashboard {printable(event.detail['dashboard'])}", file=sys.stderr)
        self._tokens_each = plan.problem.tokens * plan.problem.batch / plan.subproblems
        self._start = self._drawn = clock.now()
        self._bar = tqdm(
            total=plan.subproblems,
            initial=plan.subproblems - cast(int, event.detail["left"]),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} subproblems{postfix}",
        )

    def _draw(self, bar: tqdm[None]) -> None:
        seconds, done = clock.now() - self._start, max(0, bar.n - bar.initial)  # fewer where work was lost
        rate = clock.rate(done, seconds)
        words = f"{format_seconds(seconds)}, {rate * self._tokens_each:,.0f} tokens/s"
        if rate > 0:
            words += f", about {format_seconds((bar.total - bar.n) / rate)} left"
        self._drawn = clock.now()
        bar.set_postfix_str(words)  # which draws it
