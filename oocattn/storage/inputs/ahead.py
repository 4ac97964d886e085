"""Reading ahead of what is decoded: how many reads may be under way, and how many bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MOST_READS = 32
"""Reads at a time of a store that is read ahead."""

AHEAD_BYTES = 4 << 20
"""Bytes that one of these reads decodes, unless a chunk has more."""


class Window:
    """So many bytes, of which each read takes its share while it is under way."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._taken = 0
        self._turns: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Have those of higher turns wait until all reads of this one have begun."""
        with self._changed:
            self._turns.append(number)
        try:
            yield
        finally:
            with self._changed:
                self._turns.remove(number)
                self._changed.notify_all()

    def take(self, nbytes: int, turn: int = 0) -> int:
        """Wait until so many bytes are free and no lower turn is on, and take them; all of the window if it is smaller.

        Return what was taken.
        """
        nbytes = min(nbytes, self._nbytes)
        with self._changed:
            self._changed.wait_for(lambda: turn <= min(self._turns, default=turn) and self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        return nbytes

    def give(self, nbytes: int) -> None:
        """Give bytes back that were taken."""
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()


def cut_at_multiples(tokens: range, step: int) -> Iterator[range]:
    """Cut a range at the multiples of `step`."""
    for low in range(tokens.start - tokens.start % step, tokens.stop, step):
        yield range(max(low, tokens.start), min(low + step, tokens.stop))
