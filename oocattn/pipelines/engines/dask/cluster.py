"""The Dask cluster of a client: calls to it, its workers, and the device of each."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
from distributed import Client, fire_and_forget

from oocattn.cores import Cores, UsableCores, shared_cores
from oocattn.errors import OocattnError, ProblemError, WorkerLostError
from oocattn.naming import setting
from oocattn.pipelines.engines.base import Check
from oocattn.pipelines.engines.dask.worker_share import share_of
from oocattn.units import format_seconds

ANSWER_SECONDS = 120.0  # in which a scheduler, and workers asked for their GPUs, must answer
CORES_SECONDS = 30.0  # in which workers import PyTorch and say which cores and how much memory they may use
LEAST_ANSWER_SECONDS = 1.0  # for workers to say that they are ready, even after a time limit
ASKED_TOGETHER = 64  # workers, each over a connection of its own; a client has 512
POLL_SECONDS = 0.2  # between checks while answers are awaited
GONE_SECONDS = 1.0  # between two looks at whether workers that have not answered are still there
FIRST_WORKER_SECONDS = 60.0  # for which a run waits for a first worker
KEEPING_SECONDS = 5.0  # for which tasks keep a worker of an adaptive cluster until it has work
KEPT_AGAIN_SECONDS = 4.0  # after which it has others
KEPT_SECONDS = 0.2  # of each of them: for so long the only thread of a worker may not be free

logger = logging.getLogger("oocattn")

T = TypeVar("T")


def begin(client: Client, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> Future[T]:
    """Begin a call on the client's event loop; TimeoutError after so many seconds, unless the loop is blocked."""

    async def limited() -> T:
        try:
            return await asyncio.wait_for(call(), seconds)
        except asyncio.CancelledError as error:
            if called.cancelled():  # by its caller, who has gone: asyncio would log any other error
                raise
            raise ConnectionAbortedError("the client was closed") from error

    coroutine, loop = limited(), cast(Any, client.loop)
    try:
        called = asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)
        return called
    except RuntimeError as error:  # the loop is closed
        coroutine.close()
        failed = Future[T]()
        failed.set_exception(error)
        return failed


def no_check() -> None:
    """Nothing ends what waits for a cluster, but its own time."""


def answer(client: Client, call: Callable[[], Awaitable[T]], seconds: float = ANSWER_SECONDS, check: Check = no_check) -> T:
    """The result of a call; TimeoutError after so many seconds. `check` is called again and again meanwhile."""
    called = begin(client, call, seconds)
    try:
        poll({"": called}, seconds, lambda _: check())
        return called.result(timeout=0.1)
    except OocattnError:
        raise
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer for {format_seconds(seconds)}") from error
    finally:
        called.cancel()  # if it has not ended


def worker_addresses(client: Client, seconds: float = ANSWER_SECONDS, check: Check = no_check) -> list[str]:
    """The addresses of the client's workers, in a fixed order; TimeoutError after so many seconds."""
    # The record behind `Client.scheduler_info` will not do: a task of the client empties it every other second.
    return sorted(answer(client, client.nthreads, seconds, check))


def warn_of_open_ports(client: Client, check: Check) -> None:
    """Warn of a cluster that is not encrypted and can be reached from other machines."""
    scheduler = [str(client.scheduler.address)] if client.scheduler else []
    for address in scheduler + worker_addresses(client, check=check):
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


def is_in_process(address: str) -> bool:
    """Whether a worker is a thread of this process."""
    return address.startswith("inproc://")


def host_of(address: str) -> str:
    """The machine of a worker, as far as its address tells: containers and namespaces with their own are machines too."""
    return urlsplit(address).hostname or address


def find_cores(client: Client, workers: Sequence[str], check: Check) -> Cores | None:
    """The cores of the machine with most of these workers, and what each of all workers may use at least.

    None where they are threads of this process, or none of them says it in time. What workers lack, a run finds later.
    """
    others = [address for address in workers if not is_in_process(address)]
    calls = ask_each(client, others, CORES_SECONDS, check, share_of)
    answers = {address: call.result() for address, call in calls.items() if not (call.cancelled() or call.exception())}
    found = {address: each for address, each in answers.items() if isinstance(each, UsableCores)}
    if not found:
        return None
    host, _ = Counter(map(host_of, found)).most_common(1)[0]
    there = shared_cores(each for address, each in found.items() if host_of(address) == host)
    return shared_cores(found.values())._replace(machine=there.machine)


def room_on(taken: Iterable[str], most: int) -> Callable[[str], bool]:
    """A function that takes a worker, and returns True, while fewer than `most` are taken on its machine."""
    count = Counter(map(host_of, taken))

    def take(address: str) -> bool:
        count[host_of(address)] += 1
        return count[host_of(address)] <= most

    return take


def wait_for_first(client: Client, check: Check) -> None:
    """Wait `FIRST_WORKER_SECONDS` for a worker, and say so; ProblemError without one."""
    if living_workers(client, check=check):
        return
    seconds = format_seconds(FIRST_WORKER_SECONDS)
    logger.warning("the cluster has no worker: waiting for one, %s at most", seconds)
    if not wait_for_workers(client, 1, FIRST_WORKER_SECONDS, FIRST_WORKER_SECONDS, check):
        raise ProblemError(
            f"0 workers after {seconds}: a run needs at least one; start workers and run again (if Dask keeps restarting "
            "them, set memory_limit=0)"
        )


def wait_for_workers(client: Client, count: int, seconds: float, seconds_for_any: float, check: Check) -> int:
    """Wait for so many workers, at most `seconds` where there are some, `seconds_for_any` where there is none.

    Returns how many there are. Raises WorkerLostError where the scheduler does not answer.
    """
    began, kept, there = time.monotonic(), list[Any](), 0
    try:
        while (there := len(living_workers(client, check=check))) < count:
            if time.monotonic() - began > (seconds if there else seconds_for_any):
                break
            if not there and not kept:  # an adaptive cluster starts workers for tasks alone, and stops those without
                kept = _keep(client)
            check()
            time.sleep(0.1)
    finally:
        if not there:
            _let_go(client, kept)
    return there


def wait_for_others(client: Client, known: Container[str], seconds: float, check: Check) -> None:
    """Wait, so many seconds at most, for a worker that is not known, also where none is left meanwhile."""
    until = time.monotonic() + seconds
    while all(address in known for address in living_workers(client, check=check)) and time.monotonic() < until:
        wait_for_workers(client, 1, 0.0, until - time.monotonic(), check)
        check()
        time.sleep(0.1)


@contextmanager
def keeping_workers(client: Client, check: Check) -> Iterator[Check]:
    """The check, which also gives tasks to workers again and again: an adaptive cluster stops those without."""
    given, kept = -math.inf, list[Any]()

    def keep() -> None:
        nonlocal given
        check()
        if time.monotonic() - given > KEPT_AGAIN_SECONDS:
            given = time.monotonic()
            for address in living_workers(client, check=check):
                kept.extend(_keep(client, workers=[address], allow_other_workers=True))

    keep()
    try:
        yield keep
    finally:
        _let_go(client, kept)


def _keep(client: Client, **where: Any) -> list[Any]:
    """Give a worker short tasks, one after another: their futures. They come after those of a run."""
    kept: list[Any] = []
    for _ in range(round(KEEPING_SECONDS / KEPT_SECONDS)):
        kept.append(client.submit(lambda *_: time.sleep(KEPT_SECONDS), *kept[-1:], pure=False, priority=-1, **where))
    fire_and_forget(kept)
    return kept


def _let_go(client: Client, kept: list[Any]) -> None:
    """Take back those of the tasks that have not begun."""
    with suppress(Exception):  # the scheduler is gone
        client.cancel(kept, force=True)


def check_scheduler(client: Client) -> None:
    """Raise WorkerLostError where the client has lost its scheduler."""
    if client.status not in ("running", "newly-created"):
        raise scheduler_gone(f"the client is {client.status}")


def living_workers(client: Client, seconds: float = ANSWER_SECONDS, check: Check = no_check) -> list[str]:
    """The client's workers; WorkerLostError where the scheduler is gone or silent."""
    check_scheduler(client)
    try:
        return worker_addresses(client, seconds, check)
    except OocattnError:
        raise
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise scheduler_gone(error) from error


def begin_on(client: Client, address: str, function: Callable[..., Any], *arguments: object, **options: Any) -> Future[Any]:
    """Begin a call of a function on a worker."""

    async def ask() -> Any:
        return (await client.run(function, *arguments, workers=[address], **options))[address]

    return begin(client, ask)


def ask_each(
    client: Client, workers: Sequence[str], seconds: float, check: Check, function: Callable[..., Any], *arguments: object
) -> dict[str, Future[Any]]:
    """Call a function on each of these workers, and wait for some after others, so many seconds: the calls, by address.

    Those that have not ended are cancelled, and those of workers that are gone left out. A function may raise on a worker,
    or return an error.
    """
    calls: dict[str, Future[Any]] = {}
    for first in range(0, len(workers), ASKED_TOGETHER):
        some = workers[first : first + ASKED_TOGETHER]
        asked = {address: begin_on(client, address, function, *arguments, on_error="return") for address in some}
        try:
            await_answers(client, asked, seconds, check, LEAST_ANSWER_SECONDS)
        finally:
            for call in asked.values():
                call.cancel()  # if it has not ended
        calls |= asked
    return calls


def await_answers(
    client: Client, calls: dict[str, Future[T]], seconds: float, check: Check = no_check, check_after: float = math.inf
) -> None:
    """Wait for what workers answer, by address, so many seconds at most. Calls of workers that are gone are dropped.

    For 30 s a scheduler would try to reach them. `check` is called again and again after so many seconds.
    """
    looked = 0.0

    def look(passed: float) -> None:
        nonlocal looked
        if passed > check_after:
            check()
        if passed - looked > GONE_SECONDS:
            with suppress(WorkerLostError):  # of a scheduler that is silent itself
                there = living_workers(client, min(GONE_SECONDS, seconds - passed))
                for address in [address for address, call in calls.items() if address not in there and not call.done()]:
                    calls.pop(address).cancel()
            looked = passed

    poll(calls, seconds, look)


def poll(calls: Mapping[str, Future[T]], seconds: float, look: Callable[[float], object]) -> None:
    """Wait until all calls have ended, so many seconds at most; `look` is given the seconds passed, again and again."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if not wait(calls.values(), timeout=min(POLL_SECONDS, seconds - passed)).not_done:
            return
        look(passed)


def scheduler_gone(reason: object) -> WorkerLostError:
    """The error that a client has lost its scheduler."""
    return WorkerLostError(f"the scheduler is gone ({reason}); start one and resume")


def assign_devices(client: Client, device_type: str, workers: Container[str], check: Check = no_check) -> dict[str, str]:
    """Give each of these workers a device: "cpu", or a GPU of its own like "cuda:1".

    Raises ProblemError naming one that has no GPU where one is asked for; TimeoutError where they do not answer.
    """
    addresses = [address for address in worker_addresses(client, check=check) if address in workers]
    if device_type == "cpu" or not addresses:
        return dict.fromkeys(addresses, "cpu")
    visible: dict[str, list[str]] = answer(client, lambda: client.run(_visible_gpus, workers=addresses), check=check)
    blind = [address for address in addresses if not visible[address]]
    if blind:
        raise ProblemError(
            f"worker {', '.join(blind)} sees no GPU: start workers where there is one, or choose {setting('kernel', 'cpu')}"
        )
    return {address: f"cuda:{index}" for address, index in share_out({name: visible[name] for name in addresses}).items()}


def share_out(visible: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Give each worker the GPU that fewest others have, as an index into those that it sees; of those, its first.

    `visible` names the GPUs, the same name for the same one. So workers that see all GPUs, in whatever order, and workers
    that see one each all end up with their own.
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
