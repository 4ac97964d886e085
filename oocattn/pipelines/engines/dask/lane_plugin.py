"""The plugin that keeps a lane on a worker of Dask: it tells the driver of the lane, and closes it with the worker."""

from __future__ import annotations

import asyncio
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distributed import Worker, WorkerPlugin
from distributed.metrics import time as dask_time
from distributed.worker_state_machine import StartStop
from tornado.ioloop import PeriodicCallback

from oocattn import clock
from oocattn.pipelines.lane.device_time import join_spans
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import Attended, Merged, Resource, Staged, TaskEvent, Written
from oocattn.storage.files.operations import words_of
from oocattn.threads import begin_call
from oocattn.units import format_bytes, format_seconds

logger = logging.getLogger("oocattn")

BEAT_SECONDS = 1.0  # between two signs of life of a lane
PAUSE_SECONDS = 0.05  # between two looks at whether tasks still run
CLOSE_SECONDS = 10.0  # seconds in which a lane closes, or a worker goes on without
ENDED = ("memory", "error", "rescheduled")  # states that a worker gives a task when it has ended, cancelled or not

WORK: Mapping[type[TaskEvent], Resource] = {Staged: "read", Attended: "compute", Merged: "merge", Written: "write"}
"""The resource whose spans are the work of a task; otherwise it waits for its turn, for buffers and for other threads."""


class LanePlugin(WorkerPlugin):
    """Keeps a worker's lane for a run, which does `work`, and closes it with the worker.

    Meanwhile the worker's event loop tells the driver, through the scheduler, how far the lane is, every second, and at once
    when the worker is to end. What the lane holds in memory alone is handed over before that, unless its driver has
    `dismissed` it.

    `executing` are its tasks until the worker has heard of their end: one that is cancelled, and called released at once,
    still runs to its end. What the worker tells the scheduler of a task's time is its work alone.
    """

    def __init__(self, run: str, work: Run, lane: Lane) -> None:
        self.run = run
        self.work = work
        self.lane = lane
        self.stopped = self.dismissed = self.leaving = False
        self.executing: set[Any] = set()
        self.performing = 0
        self._counting = threading.Lock()
        self._saving = asyncio.Lock()
        self._worker: Worker | None = None
        self._beating = PeriodicCallback(self._beat, 1000 * BEAT_SECONDS)

    def setup(self, worker: Worker) -> None:
        """Know the worker, whose tasks are followed."""
        self._worker = worker
        self._beat()
        self._beating.start()

    def _beat(self) -> None:
        """Tell how far the lane is."""
        worker, lane = self._worker, self.lane
        if worker is not None:
            since_step = clock.now() - lane.stepped  # clocks of hosts may differ
            beat = [worker.address, str(worker.name), lane.pairs, since_step, self.leaving]
            worker.log_event(plugin_name(self.run), beat)

    def transition(self, key: Any, start: str, finish: str, **options: Any) -> None:
        """Follow a task's state; the worker's event loop calls this."""
        if self.run in str(key):
            if finish == "executing":
                self.executing.add(key)
            elif finish in ENDED:
                self.executing.discard(key)
                if finish == "memory" and self._worker is not None:
                    tell_work(self._worker, key)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is inside as a task that a thread performs."""
        with self._counting:
            self.performing += 1
        try:
            yield
        finally:
            with self._counting:
                self.performing -= 1

    def stop(self) -> None:
        """Begin no more tasks."""
        self.stopped = True
        self.lane.stop()

    def abandon(self) -> None:
        """Begin no more tasks, and hand nothing over: the driver is gone."""
        self.dismissed = True
        self.stop()

    async def save(self) -> int:
        """Have on disk what the lane holds in memory alone; return the bytes."""
        async with self._saving:
            with sendable_errors():
                return await asyncio.wrap_future(begin_call(self.lane.save))

    async def hand_over(self, seconds: float) -> None:
        """The worker is to end: begin no task, let those that run end, half of so many seconds, and save the rest."""
        if self.dismissed or self.leaving:
            return
        self.leaving = True
        self.stop()
        self._beat()
        until = time.monotonic() + seconds / 2
        while self.performing and time.monotonic() < until:
            await asyncio.sleep(PAUSE_SECONDS)
        worker = "" if self._worker is None else self._worker.name
        try:
            written = await asyncio.wait_for(self.save(), seconds / 2)
            logger.warning("worker %s ends; its lane has handed over %s", worker, format_bytes(written))
        except Exception as error:  # the next attempt computes it again
            logger.warning("worker %s ends; its lane could not hand over what it holds: %s", worker, words_of(error))

    async def teardown(self, worker: Worker) -> None:
        """Close the lane; one that hangs is left to the end of the process."""
        await self.hand_over(CLOSE_SECONDS)
        self._beating.stop()
        closing = asyncio.wrap_future(begin_call(self.lane.close))
        try:
            await asyncio.wait([closing], timeout=CLOSE_SECONDS)
            if closing.done():
                closing.result()
            else:
                words = "worker %s: its lane did not close in %s and keeps its memory; restart the worker"
                logger.warning(words, worker.name, format_seconds(CLOSE_SECONDS))
        finally:
            remove_passing(self.work)


def remove_passing(run: Run) -> None:
    """Remove the folder in which a worker has files of the store for a moment."""
    if run.journal.mirror is not None and run.journal.mirror.passing:
        shutil.rmtree(run.paths.state, ignore_errors=True)


def tell_work(worker: Worker, key: Any) -> None:
    """Replace the time that a task held its thread by that of its work, before the scheduler hears of it."""
    event, task = worker.data.get(key), worker.state.tasks[key]
    if isinstance(event, TaskEvent):
        shift = dask_time() - clock.now() + worker.scheduler_delay  # from the lane's clock to the scheduler's
        work = [span for span in join_spans(event.spans) if span.resource == WORK[type(event)]]
        if work:  # else nothing was to be done, and Dask needs some time of each task
            other = [stretch for stretch in task.startstops if stretch["action"] != "compute"]
            stretches = [StartStop(action="compute", start=span.start + shift, stop=span.stop + shift) for span in work]
            task.startstops[:] = other + stretches


def plugin_name(run: str) -> str:
    """Name under which the lane of a run is registered on its workers."""
    return f"oocattn-{run}"


@contextmanager
def sendable_errors() -> Iterator[None]:
    """Raise errors without the causes that cannot be sent to the driver: of the whole, Dask would send but the words."""
    try:
        yield
    except Exception as error:
        _drop_unsendable_causes(error)
        raise


def _drop_unsendable_causes(error: BaseException) -> None:
    for name in ("__cause__", "__context__"):
        inner = getattr(error, name)
        if inner is not None:
            _drop_unsendable_causes(inner)
            try:
                pickle.dumps(inner)
            except Exception:  # of whatever kind: aiohttp's errors hold headers, for one
                setattr(error, name, None)
