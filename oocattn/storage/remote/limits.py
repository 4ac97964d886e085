"""When the requests of a call must have ended: at its time limit, or as soon as it is interrupted.

A store remembers the limit of the call in which it was opened, so requests of all threads are held to it. In another process
only the time limit holds.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from oocattn import clock
from oocattn.storage.inputs.kept import find, keep

END_SECONDS = 1.0
"""Seconds before a time limit at which requests end, and that one in flight has after an interruption."""

LAST_SECONDS = 0.2  # that a request has after others were given up: the lock is to be released, if the server lives
LOOK_SECONDS = 0.25  # between two looks whether a request must end

SILENT_SECONDS = 1.0
"""Seconds without an answer after which a request is named where the time is over."""

T = TypeVar("T")


class Limit:
    """The end of the requests of a call, a moment of `clock.now`; what is found of servers counts for an `outer` one too."""

    def __init__(self, until: float = math.inf, outer: Limit | None = None) -> None:
        self._until = until - END_SECONDS
        self._outer = outer
        self._failing = ""
        self._given_up: bool = outer is not None and outer._given_up

    def __reduce__(self) -> tuple[Any, ...]:
        return _recall, (keep(self), self._until + END_SECONDS)

    @property
    def failing(self) -> str:
        """Which request failed last, and how; empty where it was answered since."""
        return self._failing

    @failing.setter
    def failing(self, words: str) -> None:
        self._failing = words
        if self._outer is not None:
            self._outer.failing = words

    def _give_up(self) -> None:
        """Give other requests less time, also those that an outer call makes in the end."""
        self._given_up = True
        if self._outer is not None:
            self._outer._give_up()

    @property
    def is_over(self) -> bool:
        """Whether no request is tried again."""
        return clock.now() >= self._until

    def stop(self) -> None:
        """End requests now; a signal's handler may call this."""
        self._until = min(self._until, clock.now() + END_SECONDS)

    async def wait(self, step: Callable[[], Awaitable[T]], most: float, label: str) -> T:
        """Await one try of a request. Raises TimeoutError after `most` seconds, or where the time is over."""
        import asyncio  # which commands that ask no server do without

        began, task = clock.now(), asyncio.ensure_future(step())
        least = LAST_SECONDS if self._given_up else END_SECONDS
        try:
            while not (await asyncio.wait([task], timeout=LOOK_SECONDS))[0]:
                waited = clock.now() - began
                if waited > min(SILENT_SECONDS, most):
                    self.failing = f"{label}: no answer for {waited:.0f} s"
                if waited >= most or (self.is_over and waited >= least):
                    if self.is_over:
                        self._give_up()
                    raise TimeoutError(f"{waited:.1f} s")
            return task.result()
        finally:
            task.cancel()

    async def sleep(self, seconds: float) -> None:
        """Pause, until the time is over."""
        import asyncio

        until = clock.now() + seconds
        while not self.is_over and (left := until - clock.now()) > 0:
            await asyncio.sleep(min(LOOK_SECONDS, left))


_current: ContextVar[Limit | None] = ContextVar("oocattn-limit", default=None)


@contextmanager
def limited(until: float) -> Iterator[Limit]:
    """Hold the requests of stores that are opened inside to a limit."""
    token = _current.set(limit := Limit(until, _current.get()))
    try:
        yield limit
    finally:
        _current.reset(token)


def current_limit() -> Limit:
    """The limit of the call that this thread is in, or one without end."""
    return _current.get() or Limit()


def _recall(token: str, until: float) -> Limit:
    return find(token) or Limit(until)
