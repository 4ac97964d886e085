"""The Dask cluster of a run: an in-process one by default, or whatever the caller's client is connected to."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import dask
import torch
from distributed import Client, LocalCluster

from oocattn.errors import ProblemError, WorkerLostError

THREADS = 8
"""Task threads of a worker: up to three attend (on a GPU they wait for it), the others stage, merge and write meanwhile."""

NO_PROFILER = {"distributed.worker.profile.enabled": False}
"""Dask's profiler walks the frames of running threads every 10 ms: seen to end the process with a segmentation fault, in its
`profile.process` (CPython 3.11.7, distributed 2026.8)."""


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
    with dask.config.set({"distributed.dashboard.link": f"http://{host}:{{port}}/status", **NO_PROFILER}):
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


def worker_addresses(client: Client) -> list[str]:
    """The addresses of the client's workers, in a fixed order: one lane each.

    The scheduler is asked itself: the record behind `Client.scheduler_info` is overwritten, without workers, by a task of
    the client that runs every other second.
    """
    return sorted(client.nthreads())


def wait_for_workers(
    client: Client, count: int, seconds: float, seconds_for_any: float, check: Callable[[], object]
) -> None:
    """Wait until there are so many workers, but not for ever: longer for the first than for the others.

    `check` is called meanwhile, and ends it by raising.
    Raises WorkerLostError where the scheduler does not answer, or there is no worker after that.
    """
    began = time.monotonic()
    while (there := len(living_workers(client))) < count:
        if time.monotonic() - began > (seconds if there else seconds_for_any):
            break
        check()
        time.sleep(0.1)
    if not there:
        raise WorkerLostError("all workers are gone with what they held in memory; start some and resume")


def living_workers(client: Client) -> list[str]:
    """The addresses of the client's workers. Raises WorkerLostError where the scheduler does not answer."""
    try:
        if client.status in ("running", "newly-created"):
            return worker_addresses(client)
        reason: object = f"the client is {client.status}"
    except (OSError, TimeoutError, ValueError) as error:
        reason = error
    raise WorkerLostError(f"the scheduler is gone ({reason}); start one and resume")


def assign_devices(client: Client, device_type: str) -> dict[str, str]:
    """The device of each worker's lane, by address: "cpu", or a GPU of its own such as "cuda:1".

    Raises ProblemError where there is no worker, and naming one that has no GPU where one is asked for.
    """
    addresses = worker_addresses(client)
    if not addresses:
        raise ProblemError("0 workers: a run needs one at least; start them and try again")
    if device_type == "cpu":
        return dict.fromkeys(addresses, "cpu")
    visible: dict[str, list[str]] = client.run(_visible_gpus)
    blind = [address for address in addresses if not visible[address]]
    if blind:
        raise ProblemError(
            f"worker {', '.join(blind)} sees no GPU: start workers where there is one, or choose --kernel cpu"
        )
    return {address: f"cuda:{index}" for address, index in share_out({name: visible[name] for name in addresses}).items()}


def share_out(visible: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Give each worker the GPU, as an index into those that it sees, that fewest others have: of those, its first.

    `visible` names the GPUs, the same name for the same one. So workers that see all GPUs, in whatever order, and workers
    that see one each all end up with their own.
    """
    taken: Counter[str] = Counter()
    chosen = {}
    for worker, names in visible.items():
        index = min(range(len(names)), key=lambda index: (taken[names[index]], index))
        taken[names[index]] += 1
        chosen[worker] = index
    return chosen


def _visible_gpus() -> list[str]:
    """Host and UUID of each GPU that this process sees."""
    host = socket.gethostname()
    return [f"{host} {torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
