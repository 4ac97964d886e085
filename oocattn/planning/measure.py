"""What this machine can do, for a plan: the kernel, reading, decoding and small files are measured briefly.

The rate of writing large files is assumed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from statistics import median

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.forks import refuse_lost_gpus, refuse_lost_threads
from oocattn.kernels import AttentionState, default_kernel, device_type, finalise, get_kernel, merge, require_kernel
from oocattn.kernels.cuda.device import launcher, release_cached_memory
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.settings import plain_threads
from oocattn.planning.cost import HALF_RATE_KEYS
from oocattn.planning.machine import FILE_SECONDS, MAX_LANES, TASK_SECONDS, Device, Engine, Hardware, InputCost
from oocattn.planning.memory import PAGE
from oocattn.problem.mask import Causal
from oocattn.problem.problem import Problem
from oocattn.problem.scores import Scores
from oocattn.storage.dtypes import numpy_dtype
from oocattn.storage.files.durable import write_durably
from oocattn.storage.files.operations import name_failure
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.readers import InputArray
from oocattn.threads import ThreadPool

UNKNOWN_DISK = 1 << 60
"""Free bytes of a file system that does not say how many it has."""

SAMPLE_BYTES = 16 << 20
"""How much of an array is decoded to measure how fast that is."""

MOMENT = {"cpu": 0.15, "cuda": 0.05}
"""Seconds for which a kernel is timed: some tens of calls."""

SAMPLES, PIECE_BYTES, SAMPLE_THREADS = 4, 2 << 20, 4
"""Places of an array that are read as a sample, how much there, and threads that do. Of smaller pieces from the page
cache, the threads' turns at Python take longer than the reading."""

COPY_BYTES = 64 << 20
"""Copied to and from a GPU to measure how fast that is."""

SEGMENTS = 40 << 20
"""By how much torch's allocator may take more than it was asked for while a kernel is timed."""

ASSUMED_RATE = 1e9
"""Bytes per second where nothing was measured: local disks read and write some 1 to 2.5 GB/s."""

CACHE_RATE = 5e9
"""Bytes per second at least from the page cache; one thread reads 6 to 7 GB/s."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what the control group of this process may use, of version 2 or 1."""

CUDA_SAMPLE = (32_768, 32_768)
"""Rows and keys on which a kernel is timed on a GPU: enough to fill it, in little memory."""


FILE_MOMENT, MOST_FILES = 0.03, 8
"""Seconds after which no more files are written to measure what one costs, and how many at most."""


def describe_hardware(
    dataset: Dataset,
    problem: Problem,
    *,
    kernel: str | None,
    lanes: int | None,
    scratch: Path | None,
    engine: Engine = "dask",
) -> Hardware:
    """Measure the kernel, reading and small files on this machine and describe it for a plan.

    `kernel` pins one (default: the best for device and dtype), `lanes` is the number of workers (default: one, or one for
    each GPU), which share this machine's cores; `MAX_LANES` of them take part at most. `scratch` is the folder whose file
    system takes the partials, and `engine` carries the tasks out. Raises ProblemError for a kernel that is unknown or cannot
    serve the problem here, and where computing would never end, as in a fork.
    """
    device, name = _choose_kernel(problem, kernel)
    lanes = min(lanes or count_lanes(kernel), MAX_LANES)
    threads = max(1, torch.get_num_threads() // lanes)
    refuse_lost_threads()
    if device == "cpu":
        flops, half_rate_rows, measuring_bytes = kernel_rate(name, problem.head_dim, problem.dtype), 256, 0
        flops *= threads / torch.get_num_threads()
    else:
        rows, keys, half_rate_rows = *CUDA_SAMPLE, 2048
        measured = kernel_rate(name, problem.head_dim, problem.dtype, rows, keys, device)
        flops = measured * (1 + half_rate_rows / rows) * (1 + HALF_RATE_KEYS / keys)
        release_cached_memory(torch.device(device))
        operands = (
            AttentionState.nbytes_for(1, rows, problem.head_dim) + (rows + 2 * keys) * problem.head_dim * problem.itemsize
        )
        scratch_bytes = get_kernel(name).scratch_bytes(1, rows, keys, problem.head_dim, problem.dtype, threads)
        measuring_bytes = operands + scratch_bytes + SEGMENTS
    found = _rounded(sample_rate(dataset))
    return Hardware(
        kernel=name,
        kernel_flops=flops,
        scratch_bytes=get_kernel(name).scratch_bytes,
        device=device,
        half_rate_rows=half_rate_rows,
        max_keys=get_kernel(name).max_keys,
        rounds_weights=get_kernel(name).rounds_weights,
        lanes=lanes,
        threads=threads,
        read_rate=found,
        reread_rate=max(found, CACHE_RATE) if _fits_page_cache(problem) else found,
        task_seconds=TASK_SECONDS[engine],
        file_seconds=FILE_SECONDS if scratch is None else file_seconds(scratch),
        measuring_bytes=measuring_bytes,
        scratch_disk=UNKNOWN_DISK if scratch is None else free_disk(scratch),
    )


def _choose_kernel(problem: Problem, kernel: str | None) -> tuple[Device, str]:
    """The type of device of a run on this machine, and its kernel. Raises ProblemError as `describe_hardware`."""
    device = choose_device(kernel)
    name = kernel or default_kernel(device, problem.dtype, problem.head_dim)
    require_kernel(name, device, problem.dtype, problem.head_dim)
    return device, name


def choose_device(kernel: str | None) -> Device:
    """ "cuda" where there is a GPU, unless `kernel` is one for the CPU; else "cpu".

    Raises ProblemError if it is unknown, or for GPUs that are lost in a fork.
    """
    device = device_type(kernel) if kernel is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        refuse_lost_gpus()
    return device


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
    samples = [(array, (number + 0.5) / SAMPLES) for number in range(SAMPLES) for array in arrays]
    buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
    for _ in range(SAMPLE_THREADS):
        buffers.put(np.ones(PIECE_BYTES, np.uint8))  # touched

    def read(sample: tuple[InputArray, float]) -> int:
        array, share = sample
        batches, heads, tokens, head_dim = array.spec.four_dimensional
        row_bytes = head_dim * array.dtype.itemsize
        rows = min(tokens, max(1, PIECE_BYTES // row_bytes))
        start = int(share * (tokens - rows))
        buffer = buffers.get()
        out = buffer[: rows * row_bytes].view(array.dtype).reshape(rows, head_dim)
        try:
            array.read_rows(int(share * batches), int(share * heads), start, start + rows, out)
        finally:  # or the other reads would never end
            buffers.put(buffer)
        return out.nbytes

    with ThreadPool(SAMPLE_THREADS, "oocattn-sample") as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, samples))
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

    On the CPU the best call counts; on a GPU the median one, timed there. `device` defaults to the type that the kernel is
    for.
    """
    where = torch.device(device or device_type(name))
    if where.type == "cpu":
        with plain_threads(1, "oocattn-time") as thread:
            return thread.submit(_kernel_rate, name, head_dim, dtype, rows, keys, where).result()
    where = torch.device("cuda", where.index or 0)
    return launcher(where).submit(_kernel_rate, name, head_dim, dtype, rows, keys, where).result()


def _kernel_rate(name: str, head_dim: int, dtype: str, rows: int, keys: int, where: torch.device) -> float:
    kernel = get_kernel(name)
    torch_dtype = getattr(torch, dtype)
    query = torch.randn(1, rows, head_dim, device=where, dtype=torch_dtype)
    key, value = (torch.randn(keys, head_dim, device=where, dtype=torch_dtype) for _ in range(2))
    state = AttentionState.empty(1, rows, head_dim, where)

    def attend() -> None:
        kernel.attend(query, key, value, state, scores=Scores(head_dim**-0.5), intervals=None)

    attend()  # the first call is never the usual one
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or time.perf_counter() - began < MOMENT[where.type]:
        seconds.append(_seconds(attend, where))
    usual = median(seconds) if where.type == "cuda" else min(seconds)
    return 4.0 * rows * keys * head_dim / max(usual, 1e-9)  # a clock may be too coarse


def warm_up(problem: Problem, kernel: str | None) -> None:
    """Launch on every GPU what a run will launch, if it will use any: at first use libraries are loaded and compiled.

    Raises ProblemError for a kernel that is unknown or cannot serve the problem here.
    """
    device, name = _choose_kernel(problem, kernel)
    if device == "cuda":
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        launched = [launcher(gpu).submit(_launch_everything, name, problem.head_dim, problem.dtype, gpu) for gpu in gpus]
        for each in launched:
            each.result()


def _launch_everything(name: str, head_dim: int, dtype: str, where: torch.device) -> None:
    """What will be timed, once, and every kind of launch of a lane, but for what a rehearsal makes."""
    kernel, rows, keys = get_kernel(name), *CUDA_SAMPLE
    query = torch.randn(1, rows, head_dim, device=where, dtype=getattr(torch, dtype))
    key, value = (torch.randn(keys, head_dim, device=where, dtype=getattr(torch, dtype)) for _ in range(2))
    state = AttentionState.empty(1, rows, head_dim, where)
    kernel.attend(query, key, value, state, scores=Scores(1.0), intervals=None)
    if not kernel.plans_shapes:  # else it takes a while
        intervals = make_intervals(Causal(rows, rows), range(rows), range(rows))
        kernel.attend(query, query[0], query[0], state, scores=Scores(1.0), intervals=intervals)
    merge(state, state)
    finalise(state, query, state.den)
    torch.cuda.synchronize(where)
    del query, key, value, state
    release_cached_memory(where)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
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


def input_cost(dataset: Dataset, problem: Problem, host_memory: int) -> InputCost:
    """Measure what reading the dataset costs beyond its bytes: nothing, where chunk files are read directly.

    What would take more than `host_memory` bytes is not measured: its rate is assumed, and no plan fits the budget.
    """
    slow = [array for array in dataset.arrays.values() if not array.direct]
    if not slow:
        return InputCost()
    rates = {array.spec.name: read_rate(dataset, array.spec.name, problem, host_memory) for array in slow}
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


def read_rate(dataset: Dataset, name: str, problem: Problem, host_memory: int) -> float:
    """Bytes per second at which the beginning of an array can be read, whatever is cached, within `host_memory` bytes."""
    array, row_bytes = dataset.arrays[name], problem.head_dim * problem.itemsize
    most = min(4 * SAMPLE_BYTES, host_memory - array.decode_bytes)
    rows = min(problem.tokens, max(array.chunk_rows, SAMPLE_BYTES // row_bytes), most // row_bytes)
    if rows < 1:
        return ASSUMED_RATE
    buffer = np.empty((rows, problem.head_dim), numpy_dtype(problem.dtype))
    start = time.perf_counter()
    array.read_rows(0, 0, 0, len(buffer), buffer)
    return buffer.nbytes / max(time.perf_counter() - start, 1e-6)


def copy_rates(index: int) -> tuple[float, float]:
    """Bytes per second of a copy to GPU `index` and of one back; each is timed on the GPU, the second time it is made."""
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        host = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)

    def rate(into: torch.Tensor, source: torch.Tensor) -> float:
        return COPY_BYTES / [_seconds(lambda: into.copy_(source, non_blocking=True), device) for _ in range(2)][-1]

    return rate(there, host), rate(host, there)


def default_device_memory(lanes: int) -> int:
    """Half of the memory that is free now on the fullest GPU, in bytes, for each GPU that the lanes are on."""
    gpus = torch.cuda.device_count()
    return min(lanes, gpus) * min(torch.cuda.mem_get_info(index)[0] for index in range(gpus)) // 2


def default_host_memory() -> int:
    """Half of the memory that is free now, in bytes; of a container's limit where there is one."""
    return int(min(psutil.virtual_memory().available, *container_limits()) // 2)


def container_limits() -> list[int]:
    """The limits on this process's memory that its control group sets, in bytes.

    `distributed.system` knows them, too, but imports all of Dask.
    """
    limits = []
    for name in ("memory.max", "memory.high", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is none
            limits.append(int((CONTROL_GROUP / name).read_text()))
    return limits


def file_seconds(folder: Path) -> float:
    """Seconds that a small durable file costs on the file system that will hold `folder`, which need not exist yet.

    The median of a few, in a temporary folder that is removed again; `FILE_SECONDS` where none can be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".oocattn-", dir=_existing(folder)) as temporary:
            seconds: list[float] = []
            began = time.perf_counter()
            while len(seconds) < MOST_FILES and (not seconds or time.perf_counter() - began < FILE_MOMENT):
                start = time.perf_counter()
                write_durably(Path(temporary, str(len(seconds))), [np.zeros(PAGE, np.uint8)])
                seconds.append(time.perf_counter() - start)
    except (OSError, IntegrityError):
        return FILE_SECONDS
    return _rounded(max(median(seconds), 1e-6))


def _rounded(found: float) -> float:
    """What was measured, to a power of two: so that the same conditions make the same plan."""
    return float(2.0 ** round(math.log2(found)))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    with name_failure("look at", folder):
        while not folder.exists():
            folder = folder.parent
    return folder


def free_disk(folder: Path) -> int:
    """Free bytes on the file system that will hold `folder`, which need not exist yet; `UNKNOWN_DISK` where it says none.

    One in user space may count nothing at all; on one that is full in truth, the first write says so.
    """
    folder = _existing(folder)
    try:
        return shutil.disk_usage(folder).free or UNKNOWN_DISK
    except OSError:
        return UNKNOWN_DISK
