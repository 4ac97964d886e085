"""The cluster of a run that brings none: in this process, with its dashboard."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from oocattn.errors import ProblemError
from oocattn.forks import is_forked
from oocattn.imports import collection_paused
from oocattn.threads import ProcessLock, ThreadPool

with collection_paused():
    import dask
    import distributed.core
    import distributed.utils
    from dask.utils import key_split
    from distributed import Client, LocalCluster, Scheduler, Worker
    from distributed.comm import inproc
    from distributed.system import MEMORY_LIMIT
    from distributed.worker_state_machine import StateMachineEvent

    from oocattn.pipelines.engines.dask.dashboard import LOOPBACK, DashboardAddress
    from oocattn.pipelines.engines.dask.kept import keep, release
    from oocattn.pipelines.engines.dask.routes import DashboardPages, restrict
    from oocattn.pipelines.engines.dask.runs import PLUGIN, UPDATE_SECONDS, Runs
    from oocattn.pipelines.graph import STEPS

THREADS = 8  # of a worker, for tasks: up to four attend, others stage, merge and write
DESCRIPTORS = 24  # files that must be free to be opened: a cluster opens some ten as it starts

NO_PROFILER = {"distributed.worker.profile.enabled": False}
"""Dask's profiler walks the frames of running threads every 10 ms, and was seen to end the process with a segmentation
fault in its `profile.process` (CPython 3.11.7, distributed 2026.8)."""

NO_MEMORY_MANAGER = {f"distributed.worker.memory.{action}": False for action in ("target", "spill", "pause")}
"""What Dask would do near the memory limit."""

SETTINGS: dict[str, object] = {
    **NO_PROFILER,
    "distributed.scheduler.worker-ttl": None,  # measured by the wall clock, which may be set forward
}
"""Dask's configuration while a cluster starts."""

ENCRYPTION = "distributed.comm.require-encryption"

_starting = ProcessLock()  # else two that change Dask's configuration by turns leave it changed


@contextmanager
def local_client(dashboard_address: str = f"{LOOPBACK}:0", workers: int = 1) -> Iterator[Client]:
    """A client of a new cluster in this process; ProblemError, with the cause, where it cannot start.

    It opens no port but that of the dashboard, which pages of other origins cannot read. The memory limit that Dask shows is
    this machine's, and Dask does nothing about it: it counts mapped pages, and the plan bounds what is allocated.
    """
    address = DashboardAddress.parse(dashboard_address)
    if is_forked():
        # Dask has one thread for the whole process that unpacks tasks: where it was in use before the fork, it is not here.
        distributed.utils._offload_executor = cast(Any, ThreadPool(1, "Dask-Offload"))
    # Else Dask asks for the way to a host of the internet, and warns where is none. Other clusters here keep their address.
    inproc.global_manager._ip = inproc.global_manager._ip or LOOPBACK
    with _without_tracebacks(), _here_alone() as here:
        release()
        here.callback(_forget_handlers)
        runs, port = Runs(), 0

        def keep_page() -> None:
            found = runs.find()
            if found is not None:
                keep(address.host, port, address.hosts, found[0])

        here.callback(keep_page)  # when the cluster is closed
        cluster = here.enter_context(_start(address, workers))
        http, port = cluster.scheduler.http_application, cluster.scheduler.http_server.port
        address.check_port(port)
        cluster.page = address.page(port)
        restrict(cluster.scheduler, address.hosts)
        cluster.scheduler.add_plugin(runs, name=PLUGIN)
        http.add_application(DashboardPages(cluster.scheduler, address.origins(port), runs))
        workers_here = list(cluster.workers.values())
        cluster.sync(_close_pages, cluster.scheduler, workers_here)
        here.callback(cluster.sync, _close_workers, workers_here)
        here.callback(cluster.sync, _show_the_end, runs)
        yield here.enter_context(Client(cluster, set_as_default=False))


def _forget_handlers() -> None:
    """Have Dask forget the handlers of servers that are closed: their schedulers would stay in memory (2026.8)."""
    cache = getattr(distributed.core, "_expects_comm", None)
    if cache is not None:
        cache.cache_clear()


@contextmanager
def _here_alone() -> Iterator[ExitStack]:
    """An exit stack that does nothing in a fork, which lacks a cluster's threads."""
    process = os.getpid()
    with ExitStack() as stack:
        try:
            yield stack
        finally:
            if os.getpid() != process:
                stack.pop_all()


def _start(address: DashboardAddress, workers: int) -> _Cluster:
    """A new cluster. Raises ProblemError, with the cause, where it cannot start."""
    try:
        _check_descriptors()
        address.check_free()
        # They log that the cluster does not start, but not why, and that its folder for temporary files cannot be locked.
        with (
            _starting.held(),
            dask.config.set(SETTINGS),
            _silent("distributed.deploy.spec"),
            _silent("distributed.diskutils"),
        ):
            return _Cluster(  # type: ignore[no-untyped-call]
                n_workers=workers,
                threads_per_worker=THREADS,
                processes=False,
                memory_limit=MEMORY_LIMIT,
                dashboard_address=[(address.host, address.port)],
                scheduler_kwargs={"dashboard": False},  # its pages come when they are asked for: see DashboardPages
                worker_class=_LocalWorker,
                worker_dashboard_address=f"{LOOPBACK}:0",  # left out, a worker listens on every interface
            )
    except ProblemError:
        raise
    except Exception as error:
        raise ProblemError(f"the cluster of this process cannot start: {_reason(error)}") from error


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep Dask from logging tasks that failed, or were left behind, and workers that closed before they answered.

    The run reports them in its own words.
    """

    def is_other(record: logging.LogRecord) -> bool:  # a filter of its own for each cluster: they may overlap
        return not str(record.msg).startswith(("Compute Failed", "Run Failed", "Async instruction for", "broadcast to"))

    names = "distributed.worker", "distributed.worker.state_machine", "distributed.scheduler"
    loggers = list(map(logging.getLogger, names))
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Have a logger log nothing for a while."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_descriptors() -> None:
    """Raise OSError where few files can be opened: Dask would log each, and continue."""
    with ExitStack() as opened:
        for _ in range(DESCRIPTORS):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))


def _reason(error: BaseException) -> str:
    """The cause of an error of Dask, and advice."""
    cause = _cause(error)
    words = str(cause) or type(cause).__name__
    if isinstance(cause, OSError):
        if cause.errno in (errno.EMFILE, errno.ENFILE):
            return f"{cause.strerror}: raise the limit on open files (ulimit -n)"
        return f"{words}: Dask needs a folder for its workers; set its temporary-directory, or TMPDIR, to one"
    if dask.config.get(ENCRYPTION, None):
        return f"{words}: Dask's configuration sets {ENCRYPTION}; set distributed.comm.tls as well, or unset it"
    return words


def _cause(error: BaseException) -> BaseException:
    """The first OSError of those that led to an error, or the first of all."""
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__):
        error = before
    return error


class _Cluster(LocalCluster):
    """A cluster whose dashboard is our own `page`, whatever Dask's configuration says."""

    page = ""

    @property
    def dashboard_link(self) -> str:
        """Where that page is."""
        return self.page


class _LocalWorker(Worker):
    """A worker without web pages of its own, and with a row of Dask's task stream for each step of its lane."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with dask.config.set(NO_MEMORY_MANAGER):
            super().__init__(*arguments, **{**options, "dashboard": False})

    async def execute(self, key: Any, *, stimulus_id: str) -> StateMachineEvent:
        """Do a task; its row is that of its step, for the thread that took it is any of those that were idle."""
        ended = await super().execute(key, stimulus_id=stimulus_id)
        step = key_split(key)
        if key in self.threads and step in STEPS:
            self.threads[key] = STEPS.index(step)
        return ended


async def _close_workers(workers: list[Worker]) -> None:
    """Close workers without waiting for tasks: a run that has ended waits for none, and one may hang."""
    await asyncio.gather(*(worker.close(executor_wait=False) for worker in workers))


async def _show_the_end(runs: Runs) -> None:
    """Let open pages show how the run ended."""
    for page in runs.pages:
        page.show_now()
    if runs.pages:
        await asyncio.sleep(2 * UPDATE_SECONDS)


async def _close_pages(scheduler: Scheduler, workers: list[Worker]) -> None:
    """Stop what workers serve over HTTP, and let no page lead there: the dashboard shows all of it."""
    for worker in workers:
        worker.services.pop("dashboard").stop()
        scheduler.workers[worker.address].services.pop("dashboard", None)
