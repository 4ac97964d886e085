"""The Dask cluster of a client: its workers, and the device of each."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch
from distributed import Client, fire_and_forget

from oocattn.errors import ProblemError, WorkerLostError
from oocattn.pipelines.engines.dask.calls import answer
from oocattn.units import format_seconds

LEAST_ANSWER_SECONDS = 1.0
"""Seconds for workers to say that they are ready, even after a time limit."""

FIRST_WORKER_SECONDS = 60.0
"""Seconds for which a run waits for a first worker."""

KEEPING_SECONDS = 5.0
"""Seconds of a task that keeps a worker of an adaptive cluster until it has work."""

logger = logging.getLogger("oocattn")


def worker_addresses(client: Client, seconds: float | None = None) -> list[str]:
    """The addresses of the client's workers, in a fixed order: one lane each.

    Raises TimeoutError after so many seconds (default: `calls.ANSWER_SECONDS`).

    The scheduler is asked itself: the record behind `Client.scheduler_info` is overwritten, without workers, by a task of
    the client that runs every other second.
    """
    return sorted(answer(client, client.nthreads, seconds))


def warn_of_open_ports(client: Client) -> None:
    """Warn of a cluster that is not encrypted and can be reached from other machines."""
    scheduler = [str(client.scheduler.address)] if client.scheduler else []
    for address in scheduler + worker_addresses(client):
        if address.startswith(("tcp://", "ws://")) and not _on_loopback(address):
            logger.warning(
                "%s of the Dask cluster is not encrypted: whoever reaches its port can run code there; give the cluster TLS "
                "certificates (distributed.Security), or keep it on the loopback",
                address,
            )
            return


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def wait_for_first(client: Client, check: Callable[[], object]) -> None:
    """Wait `FIRST_WORKER_SECONDS` for a worker, and say so; ProblemError without one."""
    if living_workers(client):
        return
    seconds = format_seconds(FIRST_WORKER_SECONDS)
    logger.warning("the cluster has no worker: waiting for one, %s at most", seconds)
    if not _wait(client, 1, FIRST_WORKER_SECONDS, FIRST_WORKER_SECONDS, check):
        raise ProblemError(
            f"0 workers after {seconds}: a run needs at least one; start workers and run again (if Dask keeps restarting "
            "them, set memory_limit=0)"
        )


def wait_for_workers(
    client: Client, count: int, seconds: float, seconds_for_any: float, check: Callable[[], object]
) -> None:
    """Wait until there are so many workers.

    At most `seconds` where there are some, `seconds_for_any` where there is none. `check` is called meanwhile, and
    ends it by raising. Raises WorkerLostError where the scheduler does not answer, or there is no worker after that.
    """
    if not _wait(client, count, seconds, seconds_for_any, check):
        raise WorkerLostError("all workers are gone with what they held in memory; start some and resume")


def _wait(client: Client, count: int, seconds: float, seconds_for_any: float, check: Callable[[], object]) -> int:
    """Wait as `wait_for_workers`; return how many there are."""
    began, task, there = time.monotonic(), None, 0
    try:
        while (there := len(living_workers(client))) < count:
            if time.monotonic() - began > (seconds if there else seconds_for_any):
                break
            if not there and task is None:  # an adaptive cluster starts workers for tasks alone, and stops those without
                task = client.submit(time.sleep, KEEPING_SECONDS, pure=False)
                fire_and_forget(task)
            check()
            time.sleep(0.1)
    finally:
        if task is not None and not there:
            with suppress(Exception):  # the scheduler is gone
                client.cancel([task], force=True)
    return there


def check_scheduler(client: Client) -> None:
    """Raise WorkerLostError where the client has lost its scheduler."""
    if client.status not in ("running", "newly-created"):
        raise scheduler_gone(f"the client is {client.status}")


def living_workers(client: Client, seconds: float | None = None) -> list[str]:
    """The client's workers; WorkerLostError where the scheduler is gone or silent."""
    check_scheduler(client)
    try:
        return worker_addresses(client, seconds)
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise scheduler_gone(error) from error


def scheduler_gone(reason: object) -> WorkerLostError:
    """The error that a client has lost its scheduler."""
    return WorkerLostError(f"the scheduler is gone ({reason}); start one and resume")


def assign_devices(client: Client, device_type: str, workers: Container[str]) -> dict[str, str]:
    """Give each of these workers a device: "cpu", or a GPU of its own like "cuda:1".

    Raises ProblemError naming one that has no GPU where one is asked for; TimeoutError where they have not answered after
    `calls.ANSWER_SECONDS` seconds.
    """
    addresses = [address for address in worker_addresses(client) if address in workers]
    if device_type == "cpu" or not addresses:
        return dict.fromkeys(addresses, "cpu")
    visible: dict[str, list[str]] = answer(client, lambda: client.run(_visible_gpus, workers=addresses))
    blind = [address for address in addresses if not visible[address]]
    if blind:
        raise ProblemError(
            f"worker {', '.join(blind)} sees no GPU: start workers where there is one, or choose --kernel cpu"
        )
    return {address: f"cuda:{index}" for address, index in share_out({name: visible[name] for name in addresses}).items()}


def share_out(visible: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Give each worker the GPU that fewest others have; of those, its first.

    A GPU is an index into those that the worker sees. `visible` names the GPUs, the same name for the same one. So
    workers that see all GPUs, in whatever order, and workers that see one each all end up with their own.
    """
    sharers: Counter[str] = Counter()
    chosen = {}
    for worker, names in visible.items():
        index = min(range(len(names)), key=lambda index: (sharers[names[index]], index))
        sharers[names[index]] += 1
        chosen[worker] = index
    return chosen


def _visible_gpus() -> list[str]:
    """Host and UUID of each GPU that this process sees."""
    host = socket.gethostname()
    return [f"{host} {torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
