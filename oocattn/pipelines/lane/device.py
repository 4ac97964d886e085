"""The interface of a lane's device; a new kind is a line in `DEVICES` of `lane`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import torch

from oocattn.kernels import AttentionState
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended


class Device(Protocol):
    """A device with its memory and threads; it reports its steps to the lane's health."""

    @property
    def readers(self) -> int:
        """Threads that read chunks for it."""

    @property
    def cores(self) -> int | None:
        """Cores of each computing thread of the lane; None: as many as the process uses."""

    @property
    def allocator(self) -> Executor:
        """The one thread in which host memory is allocated."""

    @property
    def launcher(self) -> Executor:
        """The one thread in which subproblems are launched."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of host memory, as uint8 [nbytes] or more, that the device can work with."""

    def launch(self, staged: StagedChunks, partials: PartialStore, finisher: Finisher) -> Callable[[], Attended]:
        """Begin to attend a subproblem; return the function that waits for its end.

        The end is when its partials are handed over. `finisher` is told of a chunk whose last partial has begun to
        come, where that is worth it.
        """

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        """Merge one state in host memory into another; `state` is free afterwards."""

    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide the state of one head, in host memory, into out [1, n, D] and lse [1, n]."""

    def close(self) -> None:
        """Give all memory and threads back; nothing runs on the device any more."""
