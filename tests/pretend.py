"""A GPU that is pretended, so that the CUDA lane runs where there is none: its streams compute at once, on the CPU.

All of the lane is real but its clock and its memory: tiles, buffers, partials, errors. What only a GPU can show, that
streams wait for what they must, is for the tests marked `gpu`.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import Client
from support import GPU, plan_for, replanned

from oocattn import Plan
from oocattn.kernels.registry import get_kernel
from oocattn.pipelines.engines.dask import engine, readiness
from oocattn.pipelines.engines.dask.cluster import worker_addresses
from oocattn.pipelines.lane import cuda, cuda_memory, device_time
from oocattn.planning.memory import Tiles

PRETENDED = replace(GPU, kernel="torch", scratch_bytes=get_kernel("torch").scratch_bytes)
"""A made-up GPU with the one kernel for GPUs that also runs on a CPU."""


class Event:
    """When it was recorded is when all before it has ended."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, later: Event) -> float:
        return (later.seconds - self.seconds) * 1e3


class Stream:
    """Whatever is put on it is done at once."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        """It has happened."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class Memory:
    """Host memory that is not pinned."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8)

    def close(self) -> None:
        """It goes with its last view."""


@contextmanager
def nothing(*_: object) -> Iterator[None]:
    """A context that changes nothing."""
    yield


class Torch:
    """torch, with the CPU for every device and the classes above for those of CUDA."""

    cuda = SimpleNamespace(Event=Event, Stream=Stream, stream=nothing, device=nothing, empty_cache=lambda: None)
    _C = SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every worker of this process a lane on a pretended GPU, if the plan asks for one."""
    for module in (cuda, cuda_memory, device_time):
        monkeypatch.setattr(module, "torch", Torch())
    monkeypatch.setattr(cuda, "PinnedMemory", Memory)
    monkeypatch.setattr(cuda, "release_cached_memory", lambda device: None)

    def assign(client: Client, device_type: str, workers: Container[str], _: object) -> dict[str, str]:
        return dict.fromkeys(worker_addresses(client), "cuda:0" if device_type == "cuda" else "cpu")

    monkeypatch.setattr(engine, "assign_devices", assign)
    monkeypatch.setattr(readiness, "arithmetic_of", lambda *_: {"gpu": "pretended"})


def gpu_plan(dataset: Path, tiles: tuple[int, int] | None = None, partials: str | None = None, **options: object) -> Plan:
    """A plan for the pretended GPU, with tiles that suit a few hundred tokens."""
    plan = plan_for(dataset, machine=PRETENDED, partials=partials, **options)
    return plan if tiles is None else replanned(plan, tiles=Tiles(*tiles))
