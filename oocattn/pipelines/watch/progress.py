"""A progress bar on the terminal or in a notebook: work done, tokens/s and the time left."""

from __future__ import annotations

import math
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial

from tqdm.auto import tqdm

from oocattn import clock
from oocattn.log import logger
from oocattn.pipelines.watch.events import Attended, Ended, Event, Failed, Recovered, Started
from oocattn.text import printable
from oocattn.units import format_seconds

DRAWING_SECONDS = 0.1  # the least time between two drawings of the bar, in seconds
MOST_IN_FLIGHT = 0.95  # of a subproblem, that the bar counts before it has ended
TICK_SECONDS = 1.0  # seconds between two drawings where no event comes


class ProgressBar:
    """A listener that draws a tqdm bar on standard error; the dashboard's address and the log are printed above it.

    Its times are by the clock of the run: tqdm's own are by the wall clock, which may be set meanwhile. The rate is that of
    the subproblems that this process has seen end, up to the last one. Between events the bar moves with time, by what is
    expected of the subproblem in flight: a thread draws it, a daemon, which ends with the run.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._drawing = threading.RLock()
        self._tokens_each = 0.0
        self._done = self._initial = 0
        self._start = self._drawn = self._advanced = 0.0

    def __call__(self, event: Event) -> None:
        with self._drawing:
            if isinstance(event, Started):
                self._begin(event)
            elif self._bar is not None:
                if isinstance(event, Recovered):
                    self._done = self._bar.total - event.left
                    self._initial = min(self._initial, self._done)  # what was lost is done again
                elif isinstance(event, Attended):
                    self._done += 1
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
        self._done = self._initial = plan.subproblems - event.left
        self._bar = tqdm(
            total=plan.subproblems, initial=self._done, dynamic_ncols=True, bar_format=self._format(plan.subproblems)
        )
        logger.around = partial(tqdm.external_write_mode, file=sys.stderr)
        threading.Thread(target=self._tick, args=(self._bar,), name="oocattn-bar", daemon=True).start()

    def _end(self, bar: tqdm[None]) -> None:
        logger.around = nullcontext
        self._bar = None
        self._draw(bar)
        bar.close()

    def _tick(self, bar: tqdm[None]) -> None:
        """Draw the bar from time to time until it has ended."""
        while True:
            time.sleep(TICK_SECONDS)
            with self._drawing:
                if self._bar is not bar:
                    return
                if clock.now() - self._drawn >= TICK_SECONDS / 2:
                    self._draw(bar)

    def _is_due(self, event: Event, bar: tqdm[None]) -> bool:
        """True if the bar is to be drawn now, not at an event that may be far away."""
        slow = isinstance(event, Attended) and self._seconds_each(bar) >= DRAWING_SECONDS
        return slow or clock.now() - self._drawn >= DRAWING_SECONDS

    def _format(self, total: int) -> str:
        return f"{{l_bar}}{{bar}}| {self._done}/{total} subproblems{{postfix}}"

    def _draw(self, bar: tqdm[None]) -> None:
        self._drawn = clock.now()
        each, in_flight = self._seconds_each(bar), 0.0
        words = format_seconds(self._drawn - self._start)
        if each < math.inf:
            rate = clock.rate(self._tokens_each, each)
            words += f", {rate:,.{0 if rate >= 10 else 1}f} tokens/s"
        if each < math.inf and self._done < bar.total:
            passed = self._drawn - self._advanced
            in_flight = min(MOST_IN_FLIGHT, passed / each) if each > 0 else 0.0
            words += f", about {format_seconds(max(0.0, (bar.total - self._done) * each - passed))} left"
        bar.n = self._done + in_flight
        bar.bar_format = self._format(bar.total)
        bar.set_postfix_str(words)  # which draws it

    def _seconds_each(self, bar: tqdm[None]) -> float:
        """Seconds of a subproblem on average in this process, one that is overdue included; Inf before the first."""
        done = self._done - self._initial
        if done <= 0:
            return math.inf
        overdue = (clock.now() - self._start) / (done + 1) if self._done < bar.total else 0.0
        return max((self._advanced - self._start) / done, overdue)
