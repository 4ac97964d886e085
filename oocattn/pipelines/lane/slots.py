"""A ring of buffers on a GPU, each used again when the device has done with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Slot(Generic[T]):
    """A buffer, and the event after which it may be overwritten; None if unused."""

    buffer: T
    freed: torch.cuda.Event | None = None


class SlotRing(Generic[T]):
    """Slots in the order of their use; the user of one sets the event that frees it."""

    def __init__(self, buffers: Iterable[T]) -> None:
        self._slots = [Slot(buffer) for buffer in buffers]
        self._acquired = 0

    def acquire(self, stream: torch.cuda.Stream) -> Slot[T]:
        """The next slot; the stream waits from here on until it is free."""
        slot = self._next()
        if slot.freed is not None:
            stream.wait_event(slot.freed)
        return slot

    def _next(self) -> Slot[T]:
        slot = self._slots[self._acquired % len(self._slots)]
        self._acquired += 1
        return slot
