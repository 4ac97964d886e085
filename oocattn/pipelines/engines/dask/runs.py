"""The runs that a scheduler knows of, for the page in its dashboard: a scheduler plugin, and those who tell it.

A run in the scheduler's process is asked for its record. One elsewhere sends it, a few times a second while somebody looks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from distributed import Client, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from oocattn.pipelines.engines.dask.cluster import answer
from oocattn.storage.files.operations import words_of
from oocattn.threads import begin_call

PLUGIN = "oocattn-runs"
PAGE = "oocattn"  # in the dashboard
MOST_RUNS = 8  # that a scheduler remembers

UPDATE_SECONDS = 0.5  # between two updates of an open page, at least
SENDING_SECONDS, IDLE_SECONDS = 0.5, 2.0  # between two records that are sent: while somebody looks, and while nobody does
MOST_SHARE = 0.005  # of the time of a core, that all updates take, or all records that are sent
SENDING_COSTS = 2.0  # times what making an update takes, with what bokeh and the socket do of it afterwards
ANSWER_SECONDS = 5.0  # in which the scheduler must take a record

NO_PAGE = "the run goes on without its page in Dask's dashboard: %s"

logger = logging.getLogger("oocattn")

Record = dict[str, Any]


class Page(Protocol):
    """A page that somebody looks at."""

    def show_now(self) -> None:
        """Show the newest record as soon as possible."""


class Runs(SchedulerPlugin):
    """The records of the last runs of a scheduler, by name, and the open `pages`."""

    name = PLUGIN

    def __init__(self) -> None:
        self.pages: set[Page] = set()
        self.refusal: str | None = None  # why there is no page; None before it was opened
        self.opening = False
        self._records: dict[str, Record] = {}
        self._received: dict[str, float] = {}
        self._sources: dict[str, Callable[[], Record]] = {}

    def take(self, name: str, record: Record) -> None:
        """Remember the newest record of a run."""
        self._records[name] = record
        self._received[name] = time.monotonic()
        for oldest in list(self._records)[:-MOST_RUNS]:
            self._records.pop(oldest, None)
            self._received.pop(oldest, None)

    @contextmanager
    def following(self, source: Callable[[], Record]) -> Iterator[None]:
        """Ask this source for the record of a run while inside; then remember the last one."""
        name = uuid.uuid4().hex[:8]
        self._sources[name] = source
        self._refresh(name)
        try:
            yield
        finally:
            self._refresh(name)
            self._sources.pop(name, None)

    def _refresh(self, name: str) -> None:
        """Ask a source; one that fails is asked no more, and its run goes on."""
        try:
            self.take(name, self._sources[name]())
        except Exception as error:
            if self._sources.pop(name, None):
                logger.warning(NO_PAGE, f"{type(error).__name__}: {error}")

    @property
    def viewers(self) -> int:
        """How many pages are open."""
        return len(self.pages)

    @property
    def names(self) -> list[str]:
        """The runs that are remembered, the latest first."""
        return list(reversed(self._records))

    def find(self, name: str = "", most_age: float = 0.0) -> tuple[Record, float] | None:
        """The record of a run, or of the latest, and how many seconds old it is; None where there is none.

        One that is not older than `most_age` seconds is not made again: several pages show it.
        """
        name = name if name in self._records else next(iter(self.names), "")
        if name in self._sources and time.monotonic() - self._received[name] > most_age:
            self._refresh(name)
        if name in self._records:
            return self._records[name], time.monotonic() - self._received[name]
        return None


def pause_after(seconds: float, least: float) -> float:
    """Seconds from now to the next update or record, where this one took so much processor time to make."""
    return max(least, SENDING_COSTS * seconds / MOST_SHARE)


def find_runs(scheduler: Scheduler) -> Runs | None:
    """The runs that a scheduler knows of; None where it has no such plugin."""
    found = scheduler.plugins.get(PLUGIN)
    return found if isinstance(found, Runs) else None


async def post(name: str, record: Record, dask_scheduler: Scheduler) -> tuple[int, str]:
    """Have the scheduler remember a record, and show it; return the number of open pages, or why there is no page.

    The first call opens the page, which may take longer than its caller waits.
    """
    runs = find_runs(dask_scheduler)
    if runs is None:
        runs = Runs()
        dask_scheduler.add_plugin(runs, name=PLUGIN)
    if not runs.refusal:
        runs.take(name, record)
    if runs.refusal is None and not runs.opening:
        runs.opening = True
        try:
            runs.refusal = await _open_page(dask_scheduler, runs)
        finally:
            runs.opening = False
    return runs.viewers, runs.refusal or ""


async def _open_page(scheduler: Scheduler, runs: Runs) -> str:
    """Add the page to the dashboard of a caller's scheduler; return why that is not possible, or ""."""
    if not getattr(scheduler, "http_application", None) or not scheduler.http_application.applications:
        return "the scheduler has no dashboard"
    # In a thread: the scheduler has other things to do meanwhile.
    page = await asyncio.wrap_future(begin_call(partial(import_module, "oocattn.pipelines.engines.dask.page")))
    return str(page.add_page(scheduler, runs))


@contextmanager
def shown(client: Client, source: Callable[[], Record]) -> Iterator[bool]:
    """Have the dashboard of the client's cluster show a run while inside; where it cannot, one line says so.

    Gives whether the dashboard takes it, as far as that is known at the beginning.
    """
    here = getattr(client.cluster, "scheduler", None)
    runs = find_runs(here) if isinstance(here, Scheduler) else None
    if runs is not None:  # the cluster is the run's own
        with runs.following(source):
            yield True
        return
    with _Sender(client, source).sending() as taken:
        yield taken


class _Sender:
    """Sends the record of a run to the scheduler of a client, from a thread of its own."""

    def __init__(self, client: Client, source: Callable[[], Record]) -> None:
        self._client = client
        self._source = source
        self._name = uuid.uuid4().hex[:8]
        self._ended = threading.Event()

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Send while inside, and once more at the end. Nothing that fails here reaches the run."""
        if self._send() is None:
            yield False
            return
        thread = threading.Thread(target=self._send_repeatedly, name="oocattn-page", daemon=True)
        thread.start()
        try:
            yield True
        finally:
            self._ended.set()
            thread.join(ANSWER_SECONDS)
            if self._client.status == "running":
                self._send()

    def _send_repeatedly(self) -> None:
        pause: float | None = SENDING_SECONDS
        while pause is not None and not self._ended.wait(pause):
            pause = self._send()

    def _send(self) -> float | None:
        """Send the record; return the seconds until the next, or None where there is no use in it."""
        try:
            began = time.thread_time()
            record = self._source()
            took = time.thread_time() - began
            viewers, refusal = answer(
                self._client, lambda: self._client.run_on_scheduler(post, self._name, record), ANSWER_SECONDS
            )
        except TimeoutError:  # it has much to do, or opens its pages: the next record is newer
            return IDLE_SECONDS
        except Exception as error:
            logger.warning(NO_PAGE, words_of(error) or type(error).__name__)
            return None
        if refusal:  # as its owner wants it
            logger.info(NO_PAGE, refusal)
            return None
        return pause_after(took, SENDING_SECONDS if viewers else IDLE_SECONDS)
