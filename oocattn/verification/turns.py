"""Threads that take turns: calls that begin in an order pass one point in that order."""

from __future__ import annotations

import threading
from types import TracebackType


class Turns:
    """The turns of calls numbered from 0 on, each of which begins after those before it."""

    def __init__(self) -> None:
        self._passed, self._changed = 0, threading.Condition()

    def of(self, number: int) -> Turn:
        """The turn of a call, which is over when its `with` ends."""
        return Turn(self, number)

    def wait(self, number: int) -> None:
        """Wait until the turns before this one are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._passed == number)

    def end(self, number: int) -> None:
        """End a turn, after those before it."""
        self.wait(number)
        with self._changed:
            self._passed += 1
            self._changed.notify_all()


class Turn:
    """One turn, in a `with` statement: the next one's comes however it ends."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns, self._number = turns, number

    def __enter__(self) -> Turn:
        return self

    def wait(self) -> None:
        """Wait until it is this one's turn."""
        self._turns.wait(self._number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turns.end(self._number)
