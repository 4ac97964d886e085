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

END_SECONDS = 0.75
"""Seconds before a time limit at which requests begin to end; what all requests to a server that answers none then share."""

LOOK_SECONDS, LAST_LOOK_SECONDS = 0.25, 0.05
"""Seconds between two looks whether a request must end, and between those once the time is over."""

SILENT_SECONDS = 1.0
"""Seconds without an answer after which a request is named where the time is over."""

T = TypeVar("T")


class _Server:
    """How long requests that must end have waited for a server since its last answer: what overlaps counts once."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._counted = -math.inf

    def count(self, since: float, now: float) -> None:
        """Add the time from a moment until now, unless it was counted."""
        self.waited += max(0.0, now - max(since, self._counted))
        self._counted = now


class Limit:
    """The end of the requests of a call, a moment of `clock.now`; what is found of servers counts for an `outer` one too.

    Once the time is over, a request has `END_SECONDS`, and so have all of them together that a server does not answer: a
    run makes many at its end, one after another. Later ones to that server are not made.
    """

    def __init__(self, until: float = math.inf, outer: Limit | None = None) -> None:
        self._until = until - END_SECONDS
        self._outer = outer
        self._failing = ""
        self._servers: dict[str, _Server] = {} if outer is None else outer._servers

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

    @property
    def over_since(self) -> float:
        """The moment from which requests must end."""
        return self._until

    def stop(self) -> None:
        """End requests now; a signal's handler may call this."""
        self._until = min(self._until, clock.now())

    def server(self, url: str) -> _Server:
        """What is known of the server, or bucket, of a URL."""
        return self._servers.setdefault("/".join(url.split("/", 3)[:3]), _Server())


class Request:
    """A request under a limit, with all its tries, which messages call `label`."""

    def __init__(self, limit: Limit, label: str, url: str) -> None:
        self.began = clock.now()
        self._limit = limit
        self._label = label
        self._server = limit.server(url)
        self._tried = False

    @property
    def is_over(self) -> bool:
        """Whether it is not tried again."""
        now = clock.now()
        late = now - max(self.began, self._limit.over_since)
        return late >= 0 and (late >= END_SECONDS or self._server.waited >= END_SECONDS)

    def answered(self, words: str = "") -> None:
        """Note that its server lives; `words` are of an answer that is a failure."""
        self._server.waited = 0.0
        if words or self._limit.failing.startswith(self._label):
            self._limit.failing = words and f"{self._label}: {words}"

    def failed(self, words: str) -> None:
        """Note how a try failed, unless none was made."""
        if self._tried:
            self._limit.failing = f"{self._label}: {words}"

    async def wait(self, step: Callable[[], Awaitable[T]], most: float) -> T:
        """Await one try. Raises TimeoutError after `most` seconds, or where the time is over."""
        import asyncio  # which commands that ask no server do without

        if self.is_over:
            raise TimeoutError("nor was there one before")
        self._tried, began, task = True, clock.now(), asyncio.ensure_future(step())
        try:
            while not (await asyncio.wait([task], timeout=self._look_seconds))[0]:
                waited = clock.now() - began
                if waited > min(SILENT_SECONDS, most):
                    self.failed(f"no answer for {waited:.0f} s")
                self._count(began)
                if waited >= most or self.is_over:
                    raise TimeoutError(f"{waited:.1f} s")
            return task.result()
        finally:
            task.cancel()

    async def sleep(self, seconds: float) -> None:
        """Pause between two tries, until the time is over."""
        import asyncio

        began = clock.now()
        while not self.is_over and (left := began + seconds - clock.now()) > 0:
            await asyncio.sleep(min(self._look_seconds, left))
            self._count(began)

    @property
    def _look_seconds(self) -> float:
        return LOOK_SECONDS if clock.now() < self._limit.over_since else LAST_LOOK_SECONDS

    def _count(self, began: float) -> None:
        since, now = max(began, self._limit.over_since), clock.now()
        if now > since:
            self._server.count(since, now)


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
