"""The Dask cluster of a run: an in-process one by default, or whatever the caller's client is connected to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dask
from distributed import Client, LocalCluster

THREADS = 4
"""Task threads of a worker: one attends, the others stage, merge and write meanwhile."""


@contextmanager
def local_client(dashboard_address: str = "127.0.0.1:0") -> Iterator[Client]:
    """A client of a new cluster in this process: one worker for the CPU, and the dashboard on the loopback.

    The cluster opens no port but those of the dashboard and of the worker's pages. Dask's own memory limit is off: it
    counts mapped pages, and the plan bounds what is allocated.
    """
    host = dashboard_address.rpartition(":")[0] or "127.0.0.1"
    with (
        dask.config.set({"distributed.dashboard.link": f"http://{host}:{{port}}/status"}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=THREADS,
            processes=False,
            memory_limit=0,
            dashboard_address=dashboard_address,
            worker_dashboard_address=f"{host}:0",  # left out, a worker listens on every interface
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def worker_addresses(client: Client) -> list[str]:
    """The addresses of the client's workers, in a fixed order: one lane each."""
    return sorted(client.scheduler_info(n_workers=-1)["workers"])
