"""A progress bar on the terminal: work done, tokens/s and the time left."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial

from tqdm import tqdm

from oocattn import clock
from oocattn.log import logger
from oocattn.pipelines.watch.events import Attended, Ended, Event, Failed, Recovered, Started
from oocattn.text import printable
from oocattn.units import format_seconds

DRAWING_SECONDS = 0.1  # the least time between two drawings of the bar, in seconds


class ProgressBar:
    """A listener that draws a tqdm bar on standard error; the dashboard's address and the log are printed above it.

    Its times are by the clock of the run: tqdm's own are by the wall clock, which may be set meanwhile. The rate is that of
    the subproblems that this process has seen end, up to the last one.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._tokens_each = 0.0
        self._start = self._drawn = self._advanced = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._begin(event)
        elif self._bar is not None:
            if isinstance(event, Recovered):
                self._bar.n = self._bar.total - event.left
                self._bar.initial = min(self._bar.initial, self._bar.n)  # what was lost is done again
            elif isinstance(event, Attended):
                self._bar.n += 1
                self._advanced = clock.now()
            if isinstance(event, Failed | Ended):
                self._end(self._bar)
            elif self._is_due(event, self._bar):
                self._draw(self._bar)

    def _begin(self, event: Started) -> None:
        plan = event.plan
        if event.dashboard:
            tqdm.write(f"dashboard {printable(event.dashboard)}", file=sys.stderr)
        self._tokens_each = plan.problem.out_rows * plan.problem.batch / max(1, plan.subproblems)
        self._start = self._drawn = self._advanced = clock.now()
        self._bar = tqdm(
            total=plan.subproblems,
            initial=plan.subproblems - event.left,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} subproblems{postfix}",
        )
        logger.around = partial(tqdm.external_write_mode, file=sys.stderr)

    def _end(self, bar: tqdm[None]) -> None:
        logger.around = nullcontext
        self._bar = None
        self._draw(bar)
        bar.close()

    def _is_due(self, event: Event, bar: tqdm[None]) -> bool:
        """True if the bar is to be drawn now, not at an event that may be far away."""
        slow = isinstance(event, Attended) and self._seconds_each(bar) >= DRAWING_SECONDS
        return slow or clock.now() - self._drawn >= DRAWING_SECONDS

    def _draw(self, bar: tqdm[None]) -> None:
        self._drawn = clock.now()
        each = self._seconds_each(bar)
        words = format_seconds(self._drawn - self._start)
        if each < math.inf:
            rate = clock.rate(self._tokens_each, each)
            words += f", {rate:,.{0 if rate >= 10 else 1}f} tokens/s"
        if each < math.inf and bar.n < bar.total:
            left = (bar.total - bar.n) * each - (self._drawn - self._advanced)
            words += f", about {format_seconds(max(0.0, left))} left"
        bar.set_postfix_str(words)  # which draws it

    def _seconds_each(self, bar: tqdm[None]) -> float:
        """Seconds of a subproblem on average in this process, one that is overdue included; Inf before the first."""
        done = int(bar.n - bar.initial)
        if done <= 0:
            return math.inf
        overdue = (clock.now() - self._start) / (done + 1) if bar.n < bar.total else 0.0
        return max((self._advanced - self._start) / done, overdue)
