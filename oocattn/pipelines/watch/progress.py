"""A progress bar on the terminal or in a notebook: work done, tokens/s and the time left."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import nullcontext
from functools import partial

from tqdm.auto import tqdm

from oocattn import clock
from oocattn.log import logger
from oocattn.pipelines.watch.events import Ended, Event, Failed, Started
from oocattn.pipelines.watch.pace import Pace
from oocattn.text import printable
from oocattn.units import format_seconds

DRAWING_SECONDS = 0.1  # the least time between two drawings of the bar, in seconds
TICK_SECONDS = 1.0  # seconds between two drawings where no event comes


class ProgressBar:
    """A listener that draws a tqdm bar on standard error; the dashboard's address and the log are printed above it.

    It says what `Pace` does, by the clock of the run: tqdm's own times are by the wall clock, which may be set meanwhile.
    Between events a thread draws it, a daemon, which ends with the run.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._pace: Pace | None = None
        self._drawing = threading.RLock()
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        with self._drawing:
            if isinstance(event, Started):
                self._begin(event)
            elif self._bar is not None and self._pace is not None:
                self._pace(event)
                if isinstance(event, Failed | Ended):
                    self._end(self._bar)
                elif clock.now() - self._drawn >= DRAWING_SECONDS:
                    self._draw(self._bar)

    def _begin(self, event: Started) -> None:
        if event.dashboard:
            tqdm.write(f"dashboard {printable(event.dashboard)}", file=sys.stderr)
        self._pace = Pace(event)
        total, done = event.plan.subproblems, event.plan.subproblems - event.left
        self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format=_format(done, total))
        self._drawn = clock.now()
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

    def _draw(self, bar: tqdm[None]) -> None:
        assert self._pace is not None, "a bar is of a run that has started"
        self._drawn = clock.now()
        found = self._pace.at(self._drawn)
        words = format_seconds(found.seconds)
        words += f", {found.rate:,.{0 if found.rate >= 10 else 1}f} tokens/s" if found.rate else ""
        words += "" if self._bar is None else f", about {format_seconds(found.seconds_left)} left"
        bar.n = found.share * found.subproblems
        bar.bar_format = _format(found.subproblems_done, found.subproblems)
        bar.set_postfix_str(words)  # which draws it


def _format(done: int, total: int) -> str:
    return f"{{l_bar}}{{bar}}| {done}/{total} subproblems{{postfix}}"
