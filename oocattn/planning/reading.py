"""How fast a dataset is read and decoded on this machine, measured on samples of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from oocattn.planning.machine import InputCost
from oocattn.planning.timing import undisturbed_seconds
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.held import lie_together
from oocattn.storage.inputs.source import TensorSource
from oocattn.threads import ThreadPool

SAMPLE_BYTES = 16 << 20  # how much of an array is decoded to measure how fast that is

SAMPLES, PIECE_BYTES, SAMPLE_THREADS = 4, 2 << 20, 4
"""Places of an array that are read as a sample, how much there, and threads that do. Of smaller pieces from the page
cache, the threads' turns at Python take longer than the reading."""

ROUNDS, ROUND_SECONDS = 3, 0.3
"""The most samples of which the fastest counts, each of other places, and seconds after which no more are taken."""

FEW = 16  # parts of a file whose heads are read together, of which the samples have one at most

ASSUMED_RATE = 1e9  # bytes per second where nothing was measured: local disks read and write some 1 to 2.5 GB/s


def sample_rate(dataset: Dataset) -> float:
    """Bytes per second at which directly read arrays come in, by several threads, sampled all over: from cache or disk."""
    arrays = [dataset.arrays[name] for name in ("q", "k", "v") if dataset.arrays[name].direct]
    if not arrays:
        return ASSUMED_RATE
    parts = SAMPLES * ROUNDS * FEW * (len(arrays) if lie_together(dataset.arrays) else 1)
    buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
    for _ in range(SAMPLE_THREADS):
        buffers.put(np.ones(PIECE_BYTES, np.uint8))  # touched

    def read(sample: tuple[TensorSource, float]) -> int:
        array, share = sample
        batches, heads, tokens, head_dim = array.spec.four_dimensional
        row_bytes = head_dim * array.dtype.itemsize
        together = max(1, min(heads, array.shared_heads, PIECE_BYTES // row_bytes))  # heads, as a run reads them
        few = tokens if together == 1 else max(1, tokens // parts)
        rows = min(few, max(1, PIECE_BYTES // (row_bytes * together)))
        start, first = int(share * (tokens - rows)), int(share * (heads - together + 1))
        buffer = buffers.get()
        out = buffer[: together * rows * row_bytes].view(array.dtype).reshape(together, rows, head_dim)
        try:
            array.read_heads(int(share * batches), range(first, first + together), start, start + rows, [*out])
        finally:  # or the other reads would never end
            buffers.put(buffer)
        return out.nbytes

    with ThreadPool(SAMPLE_THREADS, "oocattn-sample") as pool:

        def read_all(part: int) -> int:
            places = ((number + (part + 0.5) / ROUNDS) / SAMPLES for number in range(SAMPLES))
            return sum(pool.map(read, [(array, share) for share in places for array in arrays]))

        return _best_rate(read_all, SAMPLE_THREADS)


def _best_rate(read: Callable[[int], int], threads: int = 1) -> float:
    """Bytes per second of the fastest of some rounds, undisturbed; `read` takes a round's number and returns its bytes."""
    rates: list[float] = []
    began = time.perf_counter()
    while not rates or (len(rates) < ROUNDS and time.perf_counter() - began < ROUND_SECONDS):
        counts: list[int] = []
        seconds = undisturbed_seconds(lambda: counts.append(read(len(rates))), threads)  # noqa: B023 - called at once
        rates.append(counts[0] / max(seconds, 1e-6))
    return max(rates)


def input_cost(dataset: Dataset, problem: Problem, host_memory: int) -> InputCost:
    """Measure what reading costs beyond its bytes; assume it where that takes more than `host_memory`: no plan fits."""
    used = [array for name, array in dataset.arrays.items() if name in ("q", "k", "v") or problem.bias_heads]
    slow = [array for array in used if not array.direct]
    tensors = [dataset.arrays[name] for name in ("q", "k", "v")]
    shared = {array.name: array.shared_heads for array in tensors if array.shared_heads > 1}
    found = InputCost(
        decode_bytes=max(array.decode_bytes for array in used), shared_heads=shared, packed=lie_together(dataset.arrays)
    )
    recorded = tuple(filter(None, [dataset.words(problem)]))
    if not slow:
        return replace(found, notes=recorded)
    rates = {array.spec.name: read_rate(dataset, array.spec.name, problem, host_memory) for array in slow}
    decoded = tuple(
        f"{array.spec.name} is {array.describe()}: that bounds reading to {rates[array.spec.name] / 1e9:.2g} GB/s"
        for array in slow
    )
    align_rows = max(array.chunk_rows for array in slow)
    return replace(found, decode_rate=min(rates.values()), align_rows=align_rows, notes=recorded + decoded)


def read_rate(dataset: Dataset, name: str, problem: Problem, host_memory: int) -> float:
    """Bytes per second at which parts of an array can be read, whatever is cached, within `host_memory` bytes."""
    array = dataset.arrays[name]
    row = () if name == "key_bias" else array.spec.shape[-1:]
    row_bytes = math.prod(row) * array.dtype.itemsize
    tokens = problem.queries if name == "q" else problem.keys
    most = min(4 * SAMPLE_BYTES, host_memory - array.decode_bytes)
    rows = min(tokens, max(array.chunk_rows, SAMPLE_BYTES // row_bytes), most // row_bytes)
    if rows < 1:
        return ASSUMED_RATE
    buffer = np.empty((rows, *row), array.dtype)

    def read(part: int) -> int:
        start = part * rows % (tokens - rows + 1)
        array.read_rows(0, 0, start, start + rows, buffer)
        return buffer.nbytes

    return _best_rate(read)
