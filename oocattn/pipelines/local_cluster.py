"""The cluster of a run that brings none: in this process, with its dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from oocattn.errors import ProblemError
from oocattn.garbage import collection_paused

with collection_paused():
    import dask
    from distributed import Client, LocalCluster

    with suppress(ImportError):  # what a scheduler imports as it starts, and goes on without a dashboard where it cannot
        import distributed.dashboard.scheduler  # noqa: F401

THREADS = 8
"""Task threads of a worker: up to three attend (on a GPU they wait for it), the others stage, merge and write meanwhile."""

NO_PROFILER = {"distributed.worker.profile.enabled": False}
"""Dask's profiler walks the frames of running threads every 10 ms: seen to end the process with a segmentation fault, in its
`profile.process` (CPython 3.11.7, distributed 2026.8)."""


NO_TIMEOUT = {"distributed.scheduler.worker-ttl": None}
"""Dask takes a worker for lost that was silent for five minutes by the wall clock, as when that is set forward; those of a
process of ours live as long as it does."""


@contextmanager
def local_client(dashboard_address: str = "127.0.0.1:0", workers: int = 1) -> Iterator[Client]:
    """A client of a new cluster in this process: a worker for the CPU or each GPU, and the dashboard on the loopback.

    The cluster opens no port but those of the dashboard and of the worker's pages. Dask's own memory limit is off: it
    counts mapped pages, and the plan bounds what is allocated; so is its profiler (`NO_PROFILER`). Raises ProblemError for
    an address that is none.
    """
    host, _, port = dashboard_address.rpartition(":")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise ProblemError(f"dashboard address {dashboard_address!r}: expected HOST:PORT, such as 127.0.0.1:8787")
    host = host or "127.0.0.1"
    with dask.config.set({"distributed.dashboard.link": f"http://{host}:{{port}}/status", **NO_PROFILER, **NO_TIMEOUT}):
        try:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=THREADS,
                processes=False,
                memory_limit=0,
                dashboard_address=dashboard_address,
                worker_dashboard_address=f"{host}:0",  # left out, a worker listens on every interface
            )
        except RuntimeError as error:
            raise ProblemError(f"dashboard address {dashboard_address!r}: {error}; choose another") from error
        with cluster, Client(cluster) as client:
            yield client
