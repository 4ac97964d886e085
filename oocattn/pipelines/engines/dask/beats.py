"""What lanes of workers tell of themselves every second: events of Dask, which the scheduler passes on to the driver."""

from __future__ import annotations

import time

from oocattn import clock
from oocattn.pipelines.engines.base import SILENT_SECONDS, LaneProgress

Beat = tuple[str, str, int, float, bool]
"""A worker's address and name, the pairs that its lane has attended, the seconds since its last step, and whether it is to
end."""


class LaneBeats:
    """The last beat of each worker. The client, which keeps it as a handler of events, calls it with each."""

    def __init__(self) -> None:
        self.progress: dict[str, LaneProgress] = {}
        self.leaving: set[str] = set()
        self._heard: dict[str, float] = {}

    def __call__(self, event: tuple[float, Beat]) -> None:
        address, name, pairs, since_step, leaving = event[1]
        if leaving:
            self.leaving.add(address)
        self._heard[address] = time.monotonic()
        self.progress[address] = LaneProgress(name, pairs, clock.now() - since_step)

    def silent(self) -> list[str]:
        """Workers that beat before and do so no more."""
        now = time.monotonic()
        return [address for address, heard in list(self._heard.items()) if now - heard > SILENT_SECONDS]


def ignore_beat(event: object) -> None:
    """A beat that comes after the end of its run."""
