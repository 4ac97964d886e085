"""What a Dask worker may take of its machine: cores, and memory before Dask gives it no more tasks."""

from __future__ import annotations

import math
from importlib import import_module
from typing import NamedTuple

import dask
from distributed import Worker

from oocattn.cores import UsableCores, usable_cores


class Memory(NamedTuple):
    """Memory of a worker in bytes: in use, Dask's limit (0: none), and the use from which on Dask gives it no tasks."""

    used: int
    limit: int
    pause: float


def memory_of(worker: Worker) -> Memory:
    """The memory of a worker."""
    manager = worker.memory_manager
    limit = int(manager.memory_limit or 0)
    terminate = worker.nanny and dask.config.get("distributed.worker.memory.terminate")  # by its nanny
    share = manager.memory_pause_fraction or terminate or math.inf
    return Memory(int(worker.monitor.get_process_memory()), limit, limit * float(share) if limit else math.inf)


def share_of(dask_worker: Worker) -> UsableCores:
    """The cores that a worker may use, and the memory that it may still take, beside all that a run imports there."""
    import_module("oocattn.pipelines.engines.dask.readiness")
    found = memory_of(dask_worker)
    return usable_cores()._replace(memory=found.pause - found.used)
