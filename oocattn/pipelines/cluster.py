"""The Dask cluster that a client is connected to: which workers it has, and the device of each."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from distributed import Client

from oocattn.arithmetic import arithmetic_of, combine
from oocattn.errors import ProblemError, WorkerLostError
from oocattn.plans import Plan


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


def describe_workers(client: Client, plan: Plan) -> dict[str, str]:
    """What the client's workers compute the plan with, by name (`arithmetic`)."""
    problem = plan.problem
    found = client.run(arithmetic_of, plan.kernel, problem.head_dim, problem.dtype, plan.device)
    return combine(list(found.values()))


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
