"""Connecting to a cluster that a caller names: an address, or an object.

What is no connected client of a Dask scheduler is refused here, with its cause, before anything else is done.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

from distributed import Client, Security, rpc
from distributed.deploy.cluster import Cluster

from oocattn.errors import ProblemError
from oocattn.text import printable
from oocattn.threads import begin_call
from oocattn.units import format_seconds

CONNECT_SECONDS = 30.0
"""Seconds in which a scheduler must answer, even one that is just being started."""

LEAST_CONNECT_SECONDS = 1.0  # that it has, however short a time limit is
RETRY_SECONDS = 0.25  # between tries of an address where nobody listens
SCHEMES = ("tcp", "tls", "ws", "wss")  # of the address of a scheduler in another process

_EXPECTED = "give the address of a Dask scheduler, like tcp://HOST:8786"


def check_client(client: object) -> None:
    """Raise ProblemError unless a client is connected and not asynchronous."""
    expected = "expected a distributed.Client that is connected to a scheduler"
    if not isinstance(client, Client):
        argument = "the cluster" if isinstance(client, Cluster) else "ADDRESS"
        if isinstance(client, str):
            argument = printable(repr(client))
        raise ProblemError(f"client is {_kind(client)}: {expected}; make one by distributed.Client({argument})")
    if client.asynchronous:
        raise ProblemError(
            f"client is asynchronous: {expected} and waits for answers; make one without asynchronous=True, and call "
            "oocattn outside of its event loop"
        )
    if client.status != "running":
        raise ProblemError(f"client is {client.status}: {expected}; connect a new one")


def _kind(value: object) -> str:
    """The type of an argument, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}" if isinstance(value, str) else f"of type {type(value).__name__}"


def connect(address: str, seconds: float = CONNECT_SECONDS) -> Client:
    """A client of the scheduler at an address, which must answer in so many seconds.

    Raises ProblemError with the cause: no such address, nobody listens there for all that time, or no Dask scheduler does.
    """
    until = time.monotonic() + max(LEAST_CONNECT_SECONDS, seconds)
    host, port = _parse(address)
    _knock(address, host, port, until)
    left = max(LEAST_CONNECT_SECONDS, until - time.monotonic())
    try:
        # In a thread: Dask waits longer than it is told for what accepts connections and is silent.
        kind = begin_call(lambda: asyncio.run(_kind_of_server(address, left))).result(timeout=left + LEAST_CONNECT_SECONDS)
        if kind == "Scheduler":
            return Client(address, timeout=left)
        reason = f"it is a {kind}"
    except TimeoutError:
        reason = f"no answer for {format_seconds(left)}"
    except Exception as error:  # whatever Dask makes of bytes that are not its own
        reason = str(error) or type(error).__name__
    raise ProblemError(
        f"what listens at {printable(address)} does not answer as a Dask scheduler ({printable(reason)[:300]}): {_EXPECTED}"
        "; one with certificates is at tls://, and Dask's configuration names them"
    )


async def _kind_of_server(address: str, seconds: float) -> str:
    """The kind of Dask server at an address, such as "Scheduler"."""
    # Asked before a client is made: one that cannot connect is never closed, and Dask may hang when it is collected.
    async with rpc(address, timeout=seconds, connection_args=Security().get_connection_args("client")) as server:
        found = await asyncio.wait_for(server.identity(), seconds)
    return str(found["type"])


def _parse(address: str) -> tuple[str, int]:
    """Host and port of an address. Raises ProblemError for what is none."""
    scheme, _, rest = address.rpartition("://")
    if (scheme or "tcp") not in SCHEMES:
        found = printable(repr(scheme))
        raise ProblemError(
            f"scheduler {printable(repr(address))} has the scheme {found}: expected one of {', '.join(SCHEMES)}; {_EXPECTED}"
        )
    with suppress(ValueError):
        parts = urlsplit(f"//{rest}")
        if parts.hostname and parts.port and rest == parts.netloc and "@" not in rest and not rest[-1].isspace():
            return parts.hostname, parts.port
    raise ProblemError(
        f"scheduler {printable(repr(address))} is no address: expected a host and a port from 1 to 65535; {_EXPECTED}"
    )


def _knock(address: str, host: str, port: int, until: float) -> None:
    """Wait until something listens at an address; ProblemError where nothing does."""
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(RETRY_SECONDS, until - time.monotonic())):
                return
        except (socket.gaierror, UnicodeError) as error:
            raise ProblemError(f"scheduler {printable(address)}: no host {printable(host)} ({error}); {_EXPECTED}") from None
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > until:
                waited = format_seconds(round(time.monotonic() - began, 1))
                raise ProblemError(
                    f"no scheduler listens at {printable(address)} ({error}), tried for {waited}: start one there, or "
                    f"{_EXPECTED}"
                ) from None
        time.sleep(RETRY_SECONDS)
