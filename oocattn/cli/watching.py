"""How a run is watched from the command line: its status drawn in place until it ends, its log without a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TextIO

from oocattn import clock
from oocattn.log import logger
from oocattn.pipelines.watch import progress_log
from oocattn.pipelines.watch.status_record import Status

LOOKING_SECONDS, LOOKING_SECONDS_ELSEWHERE = 1.0, 5.0  # between two looks at a result here, and at one behind a URL


def watch(look: Callable[[], Status], seconds: float) -> Status:
    """Draw the status every so many seconds while the run is alive; return the last one, which is drawn too.

    On what is no terminal the last one alone is printed, its lines as they are. What goes on with the run is left out: a
    line that is broken to fit a terminal is no command. It ends as well where nobody reads it any more.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def look_until_it_ends(draw: Callable[[str], None]) -> Status:
        while True:
            status = look()
            draw(str(replace(status, resume="")))
            if status.state != "running" or getattr(sys.stdout, "lost", None) is not None:
                return status
            time.sleep(seconds)

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        status = look_until_it_ends(lambda words: None)
        print(replace(status, resume=""))
        return status
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        return look_until_it_ends(lambda words: live.update(Text(words), refresh=True))


@contextmanager
def log_on_standard_error() -> Iterator[None]:
    """Within, the log goes to standard error, of a run of more than a minute with a line a minute on its progress."""
    handler, level = _Patient(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Patient(logging.StreamHandler[TextIO]):
    """Keeps what is no warning for a minute: of a run that has ended by then there is nothing to tell."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._begun = clock.now()
        self._kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._kept.append(record)
            if clock.now() - self._begun < progress_log.LOG_SECONDS:
                return
            kept, self._kept = self._kept, []
            for each in kept:
                super().emit(each)
        else:
            super().emit(record)
