"""What this machine can do, for a plan: the kernel and decoding are measured briefly, the disk's rates are assumed."""

from __future__ import annotations

import shutil
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch
from distributed.system import MEMORY_LIMIT

from oocattn.kernels import Partial, default_kernel, get_kernel
from oocattn.plans import Hardware, InputCost
from oocattn.problem import Problem
from oocattn.storage.create import numpy_dtype
from oocattn.storage.dataset import Dataset

SAMPLE_BYTES = 16 << 20
"""How much of a dataset is read to measure how fast it reads."""

MOMENT = 0.15
"""Seconds for which a kernel is timed."""

_DEVICE = "cpu"


def describe_hardware(problem: Problem, *, kernel: str | None, lanes: int, scratch: Path | None) -> Hardware:
    """Measure the kernel on this machine and describe it for a plan.

    `kernel` pins one (default: the best for device and dtype), `lanes` is the number of workers, which share this
    machine's cores, and `scratch` the folder whose file system takes the partials. Raises ProblemError for an unknown
    kernel.
    """
    name = kernel or default_kernel(_DEVICE, problem.dtype)
    threads = max(1, torch.get_num_threads() // lanes)
    return Hardware(
        kernel=name,
        kernel_flops=kernel_rate(name, problem.head_dim, problem.dtype) * threads / torch.get_num_threads(),
        scratch_bytes=get_kernel(name).scratch_bytes,
        lanes=lanes,
        threads=threads,
        scratch_disk=1 << 60 if scratch is None else free_disk(scratch),
    )


@lru_cache
def kernel_rate(name: str, head_dim: int, dtype: str, rows: int = 1024, keys: int = 4096) -> float:
    """Floating-point operations per second of a kernel on random data: the best of the short calls of a moment."""
    kernel = get_kernel(name)
    torch_dtype = getattr(torch, dtype)
    query = torch.randn(1, rows, head_dim).to(torch_dtype)
    key, value = (torch.randn(keys, head_dim).to(torch_dtype) for _ in range(2))
    state = Partial.empty(1, rows, head_dim)
    best = float("inf")
    began = time.perf_counter()
    while time.perf_counter() - began < MOMENT:
        start = time.perf_counter()
        kernel.attend(query, key, value, state, scale=head_dim**-0.5, diagonal=False)
        best = min(best, time.perf_counter() - start)
    return 4.0 * rows * keys * head_dim / best


def input_cost(dataset: Dataset, problem: Problem) -> InputCost:
    """Measure what reading the dataset costs beyond its bytes: nothing, where chunk files are read directly."""
    slow = [array for array in dataset.arrays.values() if not array.direct]
    if not slow:
        return InputCost()
    rates = {array.spec.name: read_rate(dataset, array.spec.name, problem) for array in slow}
    notes = tuple(
        f"{array.spec.name} is {array.describe()}: that bounds reading to {rates[array.spec.name] / 1e9:.2g} GB/s"
        for array in slow
    )
    return InputCost(
        decode_bytes=max(array.decode_bytes for array in slow),
        decode_rate=min(rates.values()),
        align_rows=max(array.chunk_rows for array in slow),
        notes=notes,
    )


def read_rate(dataset: Dataset, name: str, problem: Problem) -> float:
    """Bytes per second at which the beginning of an array can be read, whatever is cached."""
    array = dataset.arrays[name]
    rows = min(problem.tokens, max(array.chunk_rows, SAMPLE_BYTES // (problem.head_dim * problem.itemsize)))
    rows = min(rows, 4 * SAMPLE_BYTES // (problem.head_dim * problem.itemsize))
    buffer = np.empty((max(1, rows), problem.head_dim), numpy_dtype(problem.dtype))
    start = time.perf_counter()
    array.read_rows(0, 0, 0, len(buffer), buffer)
    return buffer.nbytes / max(time.perf_counter() - start, 1e-6)


def default_host_memory() -> int:
    """Half of the memory that is free now, in bytes; of a container's limit where there is one."""
    return int(min(psutil.virtual_memory().available, MEMORY_LIMIT) // 2)


def free_disk(folder: Path) -> int:
    """Free bytes on the file system that will hold `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
