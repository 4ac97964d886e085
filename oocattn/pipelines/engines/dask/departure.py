"""The departure of a worker that is asked to end: SIGTERM, as a preemption sends it, waits until its lanes have handed over.

By itself a worker of Dask ends at once, and a nanny's process as any does. Here the driver is told at once, tasks that run
are finished, and what lanes hold in memory alone is saved. The driver closes them as it deals out what is left, and the
worker ends. A second signal ends it as it would have without this.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from distributed import Worker, WorkerPlugin

from oocattn.pipelines.engines.dask.cluster import is_in_process
from oocattn.pipelines.engines.dask.lane_plugin import PAUSE_SECONDS, LanePlugin

HANDING_OVER_SECONDS = 20.0
"""Seconds for tasks to end and for what is left to be saved: of the 30 s to SIGKILL that queues and clouds give."""

CLOSED_SECONDS = 4.0  # then, for the driver to close what has handed over,
ANSWERED_SECONDS = 0.5  # and for it to hear of that

_NAME = "oocattn-departure"


class Departure(WorkerPlugin):
    """Holds SIGTERM of a worker's process back while it has lanes."""

    name = _NAME

    def __init__(self) -> None:
        self.asked = False
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._before: Callable[[int, FrameType | None], Any] | int | None = None
        self._leaving: asyncio.Task[None] | None = None

    def setup(self, worker: Worker) -> None:
        """Take the signal, where the worker has the process for itself."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        if not is_in_process(worker.address) and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def teardown(self, worker: Worker) -> None:
        """Give the signal back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._receive:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        self.asked = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        """Hand over, wait until the driver has closed the lanes, end the worker, and pass the signal on."""
        worker = self._worker
        assert worker is not None
        lanes = self.lanes(worker)
        if lanes:
            await asyncio.gather(*(lane.hand_over(HANDING_OVER_SECONDS) for lane in lanes))
            until = time.monotonic() + CLOSED_SECONDS
            while self.lanes(worker) and time.monotonic() < until:
                await asyncio.sleep(PAUSE_SECONDS)
            await asyncio.sleep(ANSWERED_SECONDS)
            await worker.close(executor_wait=False, nanny=False, reason="SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    def lanes(self, worker: Worker) -> list[LanePlugin]:
        """The lanes of a worker."""
        return [plugin for plugin in worker.plugins.values() if isinstance(plugin, LanePlugin)]


async def watch_for_departure(worker: Worker) -> None:
    """Have a worker hold SIGTERM back, from its first lane on."""
    if _NAME not in worker.plugins:
        await worker.plugin_add(Departure(), _NAME)


async def end_watch(worker: Worker) -> None:
    """Give SIGTERM back to a worker without lanes, unless it was asked to end."""
    plugin = worker.plugins.get(_NAME)
    if isinstance(plugin, Departure) and not plugin.asked and not plugin.lanes(worker):
        await worker.plugin_remove(_NAME)


def is_leaving(worker: Worker) -> bool:
    """Whether a worker was asked to end."""
    plugin = worker.plugins.get(_NAME)
    return isinstance(plugin, Departure) and plugin.asked
