"""How fast a dataset is read and decoded on this machine, measured on samples of it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from oocattn.planning.machine import Device, InputCost
from oocattn.planning.memory import READERS
from oocattn.planning.timing import undisturbed_seconds
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.ahead import MOST_READS, Window, cut_at_multiples
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.held import lie_together
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.values import count_not_finite
from oocattn.threads import ThreadPool
from oocattn.units import format_bytes

SAMPLE_BYTES = 16 << 20  # how much of an array is decoded to measure how fast that is

SAMPLE_THREADS: dict[Device, int] = {"cpu": 4, "cuda": READERS["cuda"]}
"""Threads that read a sample, which is of as many places of an array."""

PIECE_BYTES: dict[Device, int] = {"cpu": 2 << 20, "cuda": 8 << 20}
"""How much is read at each. Of smaller pieces from the page cache, the threads' turns at Python take longer than the
reading: with four of them and 2 MiB, 4.4 GB/s were found where a run's bytes came in at 8.5 (H200 host)."""

ROUNDS, ROUND_SECONDS = 3, 0.3
"""The most samples of which the fastest counts, each of other places, and seconds after which no more are taken."""

FEW = 16  # parts of a file whose heads are read together, of which the samples have one at most

ASKED = 3  # requests for next to nothing of which the fastest says how long a store lets each wait

SHORT_LATENCY = 0.002
"""Seconds of waiting up to which one read at a time has most of the rate."""

LEAST_AHEAD, MOST_AHEAD = 32 << 20, 256 << 20
"""Bytes that are read ahead where requests wait: eight reads, of which some wait, and what a hundred connections have."""

SCANT_AHEAD = 16 << 20
"""Bytes that are read ahead where the budget leaves no more."""

WAITS_AHEAD = 5
"""How many times what comes in the time that a request waits is read ahead. Reads that began together end together, and the
next ones wait together: the more bytes are under way, the less of the time that is."""

AHEAD_SHARE, SCANT_SHARE = 0.25, 0.5
"""Share of the host memory that decoding what is read ahead may take, and so few bytes."""

ASSUMED_RATE = 1e9  # bytes per second where nothing was measured: local disks read and write some 1 to 2.5 GB/s


FROM_DISK = 1 / 8
"""Share of the bytes of a sample above which they came from a disk: compressed ones are fewer there than decoded."""


class Rate(NamedTuple):
    """Bytes per second, and whether they came from a disk: not from the page cache, nor over a network."""

    rate: float
    from_disk: bool


def sample_rate(dataset: Dataset, device: Device) -> Rate:
    """How fast directly read arrays come in for a lane on such a device, by several threads, sampled all over.

    A GPU's readers look through them for NaN and Inf, when they read them first: what a run reads again comes in faster. On
    a CPU that is part of what bytes take of its cores.
    """
    threads, piece = SAMPLE_THREADS[device], PIECE_BYTES[device]
    arrays = [dataset.arrays[name] for name in ("q", "k", "v") if dataset.arrays[name].direct]
    if not arrays:
        return Rate(ASSUMED_RATE, from_disk=False)
    parts = threads * ROUNDS * FEW * (len(arrays) if lie_together(dataset.arrays) else 1)

    def shape(array: TensorSource) -> tuple[int, int, int]:
        """Heads, rows and columns of a sample."""
        batches, heads, tokens, head_dim = array.spec.four_dimensional
        row_bytes = head_dim * array.dtype.itemsize
        together = max(1, min(heads, array.shared_heads, piece // row_bytes))  # heads, as a run reads them
        few = tokens if together == 1 else max(1, tokens // parts)
        most = max(1, batches * heads * tokens // (threads * ROUNDS * together))  # or one sample would read what another has
        return together, min(few, most, max(1, piece // (row_bytes * together))), head_dim

    taken = max(math.prod(shape(array)) * array.dtype.itemsize for array in arrays)
    buffers: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()
    for _ in range(threads):
        buffers.put(np.ones(taken, np.uint8))  # touched

    def read(sample: tuple[TensorSource, float]) -> int:
        array, share = sample
        batches, heads, tokens, _ = array.spec.four_dimensional
        together, rows, _ = of_sample = shape(array)
        start, first = int(share * (tokens - rows)), int(share * (heads - together + 1))
        buffer = buffers.get()
        out = buffer[: math.prod(of_sample) * array.dtype.itemsize].view(array.dtype).reshape(of_sample)
        try:
            array.read_heads(int(share * batches), range(first, first + together), start, start + rows, [*out])
            if device == "cuda":
                count_not_finite(out)
        finally:  # or the other reads would never end
            buffers.put(buffer)
        return out.nbytes

    with ThreadPool(threads, "oocattn-sample") as pool:

        def read_all(part: int) -> int:
            places = ((number + (part + 0.5) / ROUNDS) / threads for number in range(threads))
            return sum(pool.map(read, [(array, share) for share in places for array in arrays]))

        return _best_rate(read_all, threads)


def _best_rate(read: Callable[[int], int], threads: int = 1) -> Rate:
    """The fastest of some rounds, undisturbed; `read` takes a round's number and returns its bytes."""
    rates, counts = list[float](), list[int]()
    began, on_disk = time.perf_counter(), _bytes_from_disks()
    while not rates or (len(rates) < ROUNDS and time.perf_counter() - began < ROUND_SECONDS):
        seconds = undisturbed_seconds(lambda: counts.append(read(len(rates))), threads)
        rates.append(counts[-1] / max(seconds, 1e-6))
    from_cache = _bytes_from_disks() - on_disk < FROM_DISK * sum(counts)  # False for NaN
    return Rate(max(rates), from_disk=not from_cache)


def _bytes_from_disks() -> float:
    """Bytes that this process has had read from disks, as Linux counts them; NaN where nobody counts."""
    try:
        return float(psutil.Process().io_counters().read_bytes)
    except (AttributeError, OSError, RuntimeError, ValueError, psutil.Error):  # no such system, or no such file there
        return math.nan


def input_cost(dataset: Dataset, problem: Problem, host_memory: int, *, ahead: bool = True) -> InputCost:
    """Measure what reading costs beyond its bytes; assume it where that takes more than `host_memory`: no plan fits.

    What a store lets wait is read ahead, unless `ahead` is false, or the memory has no room for it.
    """
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
    remote = [array for array in slow if array.is_remote]
    latency = _latency(remote)
    waits = latency > SHORT_LATENCY
    most = _most_ahead(remote, host_memory) if waits and ahead else 0
    alone = [array for array in slow if not (most and array.is_remote)]
    found_alone = {array.spec.name: read_rate(array, problem, host_memory) for array in alone}
    rates = {name: each.rate for name, each in found_alone.items()}
    if most:
        rate = read_rate_ahead(remote, problem, host_memory, most, latency)
        rates |= {array.spec.name: rate for array in remote}
    decoded = tuple(f"{array.spec.name} is {array.describe()}, {rates[array.spec.name] / 1e9:.2g} GB/s" for array in slow)
    from_disk = any(each.from_disk for each in found_alone.values())
    align_rows = max(array.chunk_rows for array in slow)
    amounts = {array.spec.name: _nbytes(array, problem) for array in slow}
    overall = sum(amounts.values()) / sum(amounts[name] / rate for name, rate in rates.items())
    found = replace(found, decode_rate=overall, align_rows=align_rows, from_disk=from_disk)
    words = f"requests wait {latency * 1e3:.0f} ms"
    if not most:
        scant = [f"{words}, and the host memory has no room to read ahead"] if waits else []
        return replace(found, notes=(*recorded, *decoded, *scant))
    most = min(most, max(LEAST_AHEAD, 1 << (math.ceil(WAITS_AHEAD * latency * rate) - 1).bit_length()))
    memory = max(found.decode_bytes, *(array.decode_bytes_ahead(most) for array in remote))
    words += f": {format_bytes(most)} are read ahead"
    return replace(found, decode_bytes=memory, latency=latency, ahead=most, notes=(*recorded, *decoded, words))


def _latency(remote: Sequence[TensorSource]) -> float:
    """Seconds that a small request to the stores of arrays takes, at least; 0 without one."""
    seconds = []
    for array in itertools.islice(itertools.cycle(remote), ASKED):
        began = time.perf_counter()
        array.ask()
        seconds.append(time.perf_counter() - began)
    return min(seconds, default=0.0)


def _most_ahead(remote: Sequence[TensorSource], host_memory: int) -> int:
    """The most bytes that may be read ahead: decoding them takes a share of the host memory; 0 where no read does."""
    sizes = [MOST_AHEAD >> halved for halved in range((MOST_AHEAD // SCANT_AHEAD).bit_length())]
    for ahead in sizes:
        share = SCANT_SHARE if ahead == SCANT_AHEAD else AHEAD_SHARE
        if max(array.decode_bytes_ahead(ahead) for array in remote) <= share * host_memory:
            return ahead
    return 0


def read_rate(array: TensorSource, problem: Problem, host_memory: int) -> Rate:
    """How fast parts of an array can be read, whatever is cached, within `host_memory` bytes."""
    rows = _sample_rows(array, problem, host_memory - array.decode_bytes)
    if rows < 1:
        return Rate(ASSUMED_RATE, from_disk=True)
    buffer = np.empty((rows, *array.row_shape), array.dtype)
    tokens = _tokens(array, problem)

    def read(part: int) -> int:
        start = part * rows % (tokens - rows + 1)
        array.read_rows(0, 0, start, start + rows, buffer)
        return buffer.nbytes

    return _best_rate(read)


def read_rate_ahead(arrays: Sequence[TensorSource], problem: Problem, host_memory: int, ahead: int, latency: float) -> float:
    """Bytes per second at which arrays in stores come in, of which so many bytes are read `ahead`, all at the same time.

    `latency` seconds are those before the first of them come. What is decoded after the last of them came counts only as far
    as it takes a core: in a run others come meanwhile.
    """
    room = (host_memory - max(array.decode_bytes_ahead(ahead) for array in arrays)) // len(arrays)
    rows = [_sample_rows(array, problem, room) for array in arrays]
    if min(rows) < 1:
        return ASSUMED_RATE
    samples = [(array, np.empty((n, *array.row_shape), array.dtype)) for array, n in zip(arrays, rows, strict=True)]
    _read_ahead([(array, buffer[:1]) for array, buffer in samples], ahead)  # what is asked first of a shard is its index
    began, began_busy = time.perf_counter(), time.process_time()
    _read_ahead(samples, ahead)
    seconds, busy = time.perf_counter() - began, time.process_time() - began_busy
    came = max(array.received for array in arrays) - began  # the store sends on while threads wait for a core
    seconds = min(seconds, max(came, latency + busy)) if came > 0 else seconds
    return sum(buffer.nbytes for _, buffer in samples) / max(seconds - min(latency, seconds / 2), 1e-6)


def _sample_rows(array: TensorSource, problem: Problem, most: int) -> int:
    """Tokens of a sample of an array, of `most` bytes at most."""
    enough = max(array.chunk_rows, SAMPLE_BYTES // array.row_bytes)
    return min(_tokens(array, problem), enough, min(4 * SAMPLE_BYTES, most) // array.row_bytes)


def _tokens(array: TensorSource, problem: Problem) -> int:
    """Tokens of an array of a problem."""
    return problem.queries if array.spec.name == "q" else problem.keys


def _nbytes(array: TensorSource, problem: Problem) -> int:
    """Bytes of an array that a problem reads, each of them once."""
    batches, heads, _ = array.extents
    return array.row_bytes * (problem.rows if array.spec.name == "q" else batches * heads * problem.keys)


def _read_ahead(samples: Sequence[tuple[TensorSource, NDArray[Any]]], ahead: int) -> None:
    """Read the first tokens of arrays into their buffers, by reads that are under way together, as a run does."""
    window = Window(ahead)

    def read(array: TensorSource, part: range, out: NDArray[Any]) -> None:
        taken = window.take(array.decoded_bytes(part.start, part.stop))
        try:
            array.read_rows(0, 0, part.start, part.stop, out)
        finally:
            window.give(taken)

    with ThreadPool(MOST_READS, "oocattn-sample") as pool:
        for begun in [
            pool.submit(read, array, part, buffer[part.start : part.stop])
            for array, buffer in samples
            for part in cut_at_multiples(range(len(buffer)), array.ahead_rows)
        ]:
            begun.result()
