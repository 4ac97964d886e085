"""A line in the log each minute, for runs that nobody watches in a terminal: logger `oocattn`, level INFO."""

from __future__ import annotations

import logging

from oocattn import clock
from oocattn.pipelines.watch.status_record import Status
from oocattn.units import format_seconds

LOG_SECONDS = 60.0  # seconds between two lines

logger = logging.getLogger("oocattn")


class ProgressLog:
    """Called with the status of a run, time and again: logs the dashboard's address first, then a line each minute."""

    def __init__(self) -> None:
        self._logged: float | None = None

    def __call__(self, status: Status) -> None:
        now = clock.now()
        if self._logged is None:
            self._logged = now
            logger.info("dashboard %s", status.dashboard or "none")
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            head = str(status).partition("\n")[0]
            left = "" if status.seconds_left is None else f"; about {format_seconds(status.seconds_left)} left"
            logger.info("%s%s", head, f"; {status.stalled}" if status.stalled else left)
