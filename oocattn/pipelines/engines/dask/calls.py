"""Calls to a Dask cluster, on the client's event loop, with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, TypeVar, cast

from distributed import Client

from oocattn.units import format_seconds

ANSWER_SECONDS = 120.0
"""Seconds in which a scheduler, and workers asked for their GPUs, must answer."""

SOON_SECONDS = 5.0
"""Seconds in which a worker says what it does, and a scheduler where tasks are."""

WAITS = 10
"""Parts of a wait; a late one, because this process was stopped, is not all of it."""

T = TypeVar("T")


def begin(client: Client, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> Future[T]:
    """Begin a call; TimeoutError after so many seconds, unless the loop is blocked."""

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


def answer(client: Client, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
    """The result of a call; TimeoutError after `seconds` (default: `ANSWER_SECONDS`)."""
    limit = ANSWER_SECONDS if seconds is None else seconds
    called = begin(client, call, limit)
    wait([called], timeout=limit)
    try:
        return called.result(timeout=0.1)
    except TimeoutError as error:
        called.cancel()
        raise TimeoutError(str(error) or f"no answer for {format_seconds(limit)}") from error


class Calls:
    """Calls to processes of a cluster by name; one that owes an answer is not called."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._calls: dict[str, Future[Any]] = {}

    def ask(self, questions: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        """The answers; None where there is none in time.

        Processes that are gone are left out: the attempt finds that itself.
        """
        for name, question in questions.items():
            if name not in self._calls or self._calls[name].done():
                self._calls[name] = begin(self._client, question)
        calls = {name: self._calls[name] for name in questions}
        for _ in range(WAITS):
            if not wait(calls.values(), timeout=SOON_SECONDS / WAITS).not_done:
                break
        return {
            name: call.result() if call.done() else None
            for name, call in calls.items()
            if not call.done() or call.exception() is None
        }
