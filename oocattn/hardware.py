"""What this machine can do, for a plan: the kernel, reading and decoding are measured briefly, writing is assumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from distributed.system import MEMORY_LIMIT
from numpy.typing import NDArray

from oocattn.kernels import Kernel, Partial, default_kernel, device_type, finalise, get_kernel, merge, require_kernel
from oocattn.kernels.cuda import launcher
from oocattn.planner import HALF_RATE_KEYS
from oocattn.plans import Hardware, InputCost
from oocattn.problem import Problem
from oocattn.storage.create import numpy_dtype
from oocattn.storage.dataset import Dataset
from oocattn.storage.readers import InputArray

SAMPLE_BYTES = 16 << 20
"""How much of a dataset is read to measure how fast it reads."""

MOMENT = 0.15
"""Seconds for which a kernel is timed."""

SAMPLES, SAMPLE_THREADS = 4, 8
"""Places of an array that are read as a sample, and threads that do."""

SEGMENTS = 40 << 20
"""By how much torch's allocator may take more than it was asked for while a kernel is timed."""

ASSUMED_RATE = 1e9
"""Bytes per second where nothing was measured: local disks read and write some 1 to 2.5 GB/s."""

CACHE_RATE = 5e9
"""Bytes per second at least from the page cache; one thread reads 6 to 7 GB/s."""

CUDA_SAMPLE = (32_768, 32_768)
"""Rows and keys on which a kernel is timed on a GPU: enough to fill it, in little memory."""


def describe_hardware(
    dataset: Dataset, problem: Problem, *, kernel: str | None, lanes: int | None, scratch: Path | None
) -> Hardware:
    """Measure the kernel and reading on this machine and describe it for a plan.

    `kernel` pins one (default: the best for device and dtype), `lanes` is the number of workers (default: one, or one for
    each GPU), which share this machine's cores, and `scratch` the folder whose file system takes the partials. Raises
    ProblemError for a kernel that is unknown or cannot serve the problem here.
    """
    device = choose_device(kernel)
    name = kernel or default_kernel(device, problem.dtype, problem.head_dim)
    require_kernel(name, device, problem.dtype, problem.head_dim)
    lanes = lanes or count_lanes(kernel)
    threads = max(1, torch.get_num_threads() // lanes)
    if device == "cpu":
        flops, half_rate_rows, measuring_bytes = kernel_rate(name, problem.head_dim, problem.dtype), 256, 0
        flops *= threads / torch.get_num_threads()
    else:
        rows, keys, half_rate_rows = *CUDA_SAMPLE, 2048
        measured = kernel_rate(name, problem.head_dim, problem.dtype, rows, keys, device)
        flops = measured * (1 + half_rate_rows / rows) * (1 + HALF_RATE_KEYS / keys)
        torch.cuda.empty_cache()
        operands = Partial.nbytes_for(1, rows, problem.head_dim) + (rows + 2 * keys) * problem.head_dim * problem.itemsize
        scratch_bytes = get_kernel(name).scratch_bytes(1, rows, keys, problem.head_dim, problem.dtype)
        measuring_bytes = operands + scratch_bytes + SEGMENTS
    found = sample_rate(dataset)
    return Hardware(
        kernel=name,
        kernel_flops=flops,
        scratch_bytes=get_kernel(name).scratch_bytes,
        device=device,
        half_rate_rows=half_rate_rows,
        max_keys=get_kernel(name).max_keys,
        lanes=lanes,
        threads=threads,
        read_rate=found,
        reread_rate=max(found, CACHE_RATE) if _fits_page_cache(problem) else found,
        measuring_bytes=measuring_bytes,
        scratch_disk=1 << 60 if scratch is None else free_disk(scratch),
    )


def choose_device(kernel: str | None) -> str:
    """ "cuda" where there is a GPU, unless `kernel` is one for the CPU; else "cpu". Raises ProblemError if it is unknown."""
    if kernel is not None:
        return device_type(kernel)
    return "cuda" if torch.cuda.is_available() else "cpu"


def count_lanes(kernel: str | None) -> int:
    """Lanes that a run of its own has on this machine: one for each GPU, or one for the CPU."""
    return max(1, torch.cuda.device_count()) if choose_device(kernel) == "cuda" else 1


def sample_rate(dataset: Dataset) -> float:
    """Bytes per second at which the dataset's directly read arrays come in, by several threads, from cache or disk.

    The samples lie all over the arrays, so that a dataset of which a part is cached gives something in between.
    """
    arrays = [array for array in dataset.arrays.values() if array.direct]
    if not arrays:
        return ASSUMED_RATE
    pieces = []
    for array in arrays:
        batches, heads, tokens, head_dim = array.spec.four_dimensional
        rows = min(tokens, max(1, SAMPLE_BYTES // SAMPLES // (head_dim * array.dtype.itemsize)))
        for number in range(SAMPLES):
            share = (number + 0.5) / SAMPLES
            start = int(share * (tokens - rows))
            pieces.append((array, int(share * batches), int(share * heads), start, np.empty((rows, head_dim), array.dtype)))

    def read(piece: tuple[InputArray, int, int, int, NDArray[Any]]) -> int:
        array, batch, head, start, out = piece
        array.read_rows(batch, head, start, start + len(out), out)
        return out.nbytes

    with ThreadPoolExecutor(SAMPLE_THREADS) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, pieces))
        return total / max(time.perf_counter() - began, 1e-6)


def _fits_page_cache(problem: Problem) -> bool:
    """Whether the dataset, once read, may be expected to stay in the page cache."""
    rows = problem.tokens * problem.head_groups * (problem.group_size + 2)
    return rows * problem.head_dim * problem.itemsize < int(psutil.virtual_memory().available) // 2


@lru_cache
def kernel_rate(
    name: str, head_dim: int, dtype: str, rows: int = 1024, keys: int = 4096, device: str | None = None
) -> float:
    """Floating-point operations per second of a kernel on random data, over the short calls of a moment.

    On the CPU the best call counts; on a GPU the median one, timed there, after calls that warm up everything that a lane
    launches. `device` defaults to the type that the kernel is for.
    """
    where = torch.device(device or device_type(name))
    if where.type == "cpu":
        return _kernel_rate(name, head_dim, dtype, rows, keys, where)
    where = torch.device("cuda", where.index or 0)
    return launcher(where).submit(_kernel_rate, name, head_dim, dtype, rows, keys, where).result()


def _kernel_rate(name: str, head_dim: int, dtype: str, rows: int, keys: int, where: torch.device) -> float:
    kernel = get_kernel(name)
    torch_dtype = getattr(torch, dtype)
    query = torch.randn(1, rows, head_dim, device=where, dtype=torch_dtype)
    key, value = (torch.randn(keys, head_dim, device=where, dtype=torch_dtype) for _ in range(2))
    state = Partial.empty(1, rows, head_dim, where)

    def attend() -> None:
        kernel.attend(query, key, value, state, scale=head_dim**-0.5, diagonal=False)

    if where.type == "cuda":
        _warm_up(kernel, query, key, value, state)
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or time.perf_counter() - began < MOMENT:
        seconds.append(_seconds(attend, where))
    return 4.0 * rows * keys * head_dim / (median(seconds) if where.type == "cuda" else min(seconds))


def _warm_up(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: Partial) -> None:
    """Launch everything once that a lane launches: libraries are loaded and kernels compiled at first use, for seconds."""
    rows = min(query.shape[1], len(key))
    for diagonal in (False, True):
        own = query[:, :rows] if diagonal else query
        part = state.rows(0, own.shape[1])
        kernel.attend(
            own, key[:rows] if diagonal else key, value[:rows] if diagonal else value, part, scale=1.0, diagonal=diagonal
        )
    few = state.rows(0, min(rows, 128))
    merge(few, few)
    finalise(few, query[:, : len(few.keys)], few.den)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long `work` takes on `device`; returns when it is done."""
    if device.type == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


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


def default_device_memory(hardware: Hardware) -> int:
    """Half of the memory that is free now on the fullest GPU, in bytes, for each lane; on a CPU that of the host."""
    if hardware.device == "cpu":
        return default_host_memory()
    return hardware.lanes * min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())) // 2


def default_host_memory() -> int:
    """Half of the memory that is free now, in bytes; of a container's limit where there is one."""
    return int(min(psutil.virtual_memory().available, MEMORY_LIMIT) // 2)


def free_disk(folder: Path) -> int:
    """Free bytes on the file system that will hold `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
