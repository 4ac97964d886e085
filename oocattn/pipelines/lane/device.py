"""The interface of a lane's device, and the health of a lane; a new kind is a line in `DEVICES` of `lane`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from oocattn import clock
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended
from oocattn.threads import ThreadPool


class Health:
    """Shared by all parts of a lane, which report their steps and failures here."""

    def __init__(self) -> None:
        self.stepped = clock.now()
        """Time of the last step: a tile, a read, a written block, a file of partials."""
        self.pairs = 0
        """Query-key pairs, of all heads, that the lane has attended, with those of a subproblem in flight."""
        self.copied_in = self.copied_out = 0
        """Bytes that were copied to the device, and from it."""
        self._counting = threading.Lock()
        self._error: BaseException | None = None

    def step(self) -> None:
        """Note that a piece of a long task is done."""
        self.stepped = clock.now()

    def attended(self, pairs: int) -> None:
        """Note that so many more pairs, of all heads, are attended."""
        with self._counting:
            self.pairs += pairs
        self.step()

    def copied(self, to_device: int = 0, from_device: int = 0) -> None:
        """Note that so many bytes are copied, or on their way."""
        with self._counting:
            self.copied_in += to_device
            self.copied_out += from_device

    def fail(self, error: BaseException) -> None:
        """Stop the lane with this error, unless another one has stopped it before."""
        if self._error is None:
            self._error = error

    @contextmanager
    def reraise_first_failure(self) -> Iterator[None]:
        """Raise the error that stopped the lane, in place of those that follow from it."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except BaseException as error:
            if self._error is None or self._error is error:
                self._error = error
                raise
            raise self._error from None  # a local variable for it would be a reference circle through the traceback

    def close(self) -> None:
        """Forget the error: its traceback refers to whatever failed, memory included."""
        self._error = None


class Device(Protocol):
    """A device with its memory and threads; it reports its steps to the lane's health."""

    readers: int  # threads that read chunks for it
    cores: int  # of each computing thread of the lane
    allocator: ThreadPool  # the one thread in which host memory is allocated
    launcher: ThreadPool  # the one thread in which subproblems are launched

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of host memory, as uint8 [nbytes] or more, that the device can work with."""

    def launch(self, staged: StagedChunks, partials: PartialStore, finisher: Finisher) -> Callable[[], Attended]:
        """Begin to attend a subproblem; return the function that waits until its partials are handed over.

        `finisher` may be told of a chunk whose last partial has begun to come.
        """

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        """Merge one state in host memory into another; `state` is free afterwards."""

    def finalise(self, head_group: int, head: int, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide the state of one head of a head group, in host memory, into out [1, n, Dv] and lse [1, n]."""

    def close(self) -> None:
        """Give all memory and threads back; nothing runs on the device any more."""
