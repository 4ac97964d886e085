"""Tiles of a query chunk on their way back from a GPU, to a thread that finishes their rows while others are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch


class ReturningTiles:
    """The tiles of a query chunk, as they are enqueued: their partials come back in this order."""

    def __init__(self) -> None:
        self._enqueued: SimpleQueue[tuple[int, torch.cuda.Event] | None] = SimpleQueue()
        self.last: torch.cuda.Event

    def add(self, stop: int, returned: torch.cuda.Event) -> None:
        """Add the tile that ends at row `stop`, whose partial is on the host after an event."""
        self.last = returned
        self._enqueued.put((stop, returned))

    @contextmanager
    def all(self) -> Iterator[None]:
        """Tiles are added inside. None come after it, also where an error has left some out."""
        try:
            yield
        finally:
            self._enqueued.put(None)

    def rows(self) -> Iterator[int]:
        """Yield up to which row the chunk is in host memory, tile by tile."""
        while (tile := self._enqueued.get()) is not None:
            stop, returned = tile
            returned.synchronize()
            yield stop
