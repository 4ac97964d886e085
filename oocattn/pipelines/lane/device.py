"""What a lane asks of its device. A new kind of device is one new module and one line in `_DEVICES`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from importlib import import_module
from typing import Protocol

import torch

from oocattn.kernels import AttentionState
from oocattn.operations import Operation
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.health import Health
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended
from oocattn.planning.plan import Plan

_DEVICES = {
    "cpu": ("oocattn.pipelines.lane.cpu", "CpuDevice"),
    "cuda": ("oocattn.pipelines.lane.cuda", "CudaDevice"),
}
"""Module and class by the kind of device. The class takes the name of the device, a plan, its operation and the health."""


class Device(Protocol):
    """A device with its memory and threads. It reports each piece of its work to the lane's health.

    `readers` threads read chunks for it. Host memory is allocated in the one thread of `allocator`, and subproblems are
    launched in the one thread of `launcher`. torch uses `cores` in threads of the lane that compute (None: as many as the
    process does).
    """

    readers: int
    allocator: Executor
    launcher: Executor
    cores: int | None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of host memory, as uint8 [nbytes] or more, that the device can work with."""

    def launch(self, staged: StagedChunks, partials: PartialStore, finisher: Finisher) -> Callable[[], Attended]:
        """Begin to attend a subproblem and to hand its partials over; return what waits for the end of that.

        `finisher` is told of a chunk whose last partial has begun to come, where that is worth it.
        """

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        """Merge one state in host memory into another; when this returns, `state` may be overwritten."""

    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide the state of one head, in host memory, into out [1, n, D] and lse [1, n]."""

    def close(self) -> None:
        """Give all memory and threads back; nothing runs on the device any more."""


def make_device(name: str, plan: Plan, operation: Operation, health: Health) -> Device:
    """The device of that name ("cpu", "cuda:1"), with the memory that a plan counts on it."""
    module, class_name = _DEVICES[name.partition(":")[0]]
    device: Device = getattr(import_module(module), class_name)(name, plan, operation, health)
    return device
