"""A bench from beginning to end: dataset, ceilings, rounds and table."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from distributed import Client

import oocattn.api
from oocattn import arguments
from oocattn.api import PLAN_OPTIONS
from oocattn.arguments import Dtype, Duration, Option, Size, checked
from oocattn.bench import ceilings
from oocattn.bench.competitors import (
    Competitor,
    Inputs,
    OutOfCore,
    QueryStationaryLoop,
    SkippedCompetitor,
    StreamCqsa,
)
from oocattn.bench.records import PAGE_CACHE, RESIDENT, Ceiling, Progress, Row, Table
from oocattn.bench.resident import Fa3Call, ResidentCall, fa3_library
from oocattn.errors import OocattnError, ProblemError
from oocattn.naming import named
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.planning.measure import choose_device, count_lanes
from oocattn.planning.plan import Plan
from oocattn.problem.arrays import DTYPES
from oocattn.problem_arguments import PROBLEM_OPTIONS
from oocattn.storage.files.folders import free_disk
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.locations import output_path
from oocattn.storage.make.synth import DATASET_OPTIONS, synthesise
from oocattn.units import format_bytes
from oocattn.verification.recompute import ExactRow, recompute_rows

TOKENS = {"cpu": 32 << 10, "cuda": 1 << 20}
HEADS = {"cpu": 4, "cuda": 8}  # defaults: a minute or two of work on two cores, and half a minute on one GPU of 2023
MEMORY_FOLDER = Path("/dev/shm")  # where Linux has a file system in memory
_PREFIX = f"oocattn-bench-{os.getpid()}-"


BENCH_OPTIONS = {name: option for name, option in PROBLEM_OPTIONS.items() if name not in ("heads", "dtype", "recorded")}
BENCH_OPTIONS["causal"] = Option(True, arguments.boolean)
"""What may be asked: what a run may be asked, but `heads` and `dtype` are those of the arrays."""


@checked(
    BENCH_OPTIONS,
    **DATASET_OPTIONS,
    **PLAN_OPTIONS,
    repeats=arguments.integer(1),
    warm_up=arguments.boolean,
    rows=arguments.integer(1),
)
def bench(
    folder: str | Path = ".",
    *,
    tokens: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    keys: int | None = None,
    value_dim: int | None = None,
    dtype: Dtype = "float16",
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    precise: bool = False,
    checkpoint_interval: Duration | None = None,
    repeats: int = 3,
    warm_up: bool = True,
    rows: int = 32,
    seed: int = 0,
    **asked: Any,
) -> Generator[Plan | Ceiling | Progress | Table, None, None]:
    """Measure this machine, and compare ways to attend a synthetic dataset.

    Plan and ceilings come first, the table last, and progress in between. `tokens` and `heads` default to 1M and 8 with a
    GPU, 32K and 4 without one, `keys` to `tokens`, `value_dim` to `head_dim`. The options from `device_memory` to
    `checkpoint_interval`, and what is `asked`, are as for `oocattn.plan`, but `causal` is True by default. The dataset, from
    `seed`, and the results lie in new folders in `folder` and in /dev/shm, which are removed at the end. oocattn runs on all
    GPUs, the others on one. Every competitor runs once in each of `repeats` rounds, after an untimed one with `warm_up`;
    `rows` rows are compared with float64. Raises as `oocattn.plan`, and ProblemError where `folder` is none or has no room.
    """
    default, where = choose_device(kernel), output_path(folder, "folder")
    sizes = _sizes(tokens or TOKENS[default], heads or HEADS[default], kv_heads, keys, head_dim, value_dim)
    _check_room(where, _elements(**sizes), str(dtype))
    options = asked | {"decomposition": decomposition, "kernel": kernel, "checkpoint_interval": checkpoint_interval}
    options |= {"chunks": chunks, "precise": precise, "device_memory": device_memory, "host_memory": host_memory}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where)))
        client = stack.enter_context(local_client(workers=count_lanes(kernel)))
        dataset = place / "qkv.zarr"
        written = _timed("wrote the dataset", lambda: synthesise(dataset, **sizes, dtype=dtype, seed=seed))
        plan = oocattn.api.plan(dataset, **options, result=place / "out.zarr")
        yield from (plan, written)
        measured, exact = list[Ceiling](), list[ExactRow]()
        yield from _keep(ceilings.measure_ceilings(plan, dataset, place), measured)
        yield _timed(f"recomputed {rows} rows in float64", lambda: exact.extend(_exact_rows(plan, dataset, rows, seed)))
        entrants = [_Entrant(competitor, exact) for competitor in competitors(plan, place, client, options, stack)]
        yield from _rounds(entrants, repeats, warm_up)
        yield Table(plan.problem, tuple(entrant.row for entrant in entrants), tuple(measured))


def _sizes(
    tokens: int, heads: int, kv_heads: int | None, keys: int | None, head_dim: int, value_dim: int | None
) -> dict[str, Any]:
    """The sizes of a dataset, where those that are not given follow from others."""
    of_keys = {"kv_heads": kv_heads or heads, "keys": keys or tokens, "value_dim": value_dim or head_dim}
    return {"tokens": tokens, "heads": heads, "head_dim": head_dim, **of_keys}


def _timed(name: str, work: Callable[[], object]) -> Progress:
    """Do something, and say how long it took."""
    start = time.perf_counter()
    work()
    return Progress(name, time.perf_counter() - start)


def _keep(found: Iterator[Ceiling], kept: list[Ceiling]) -> Iterator[Ceiling]:
    """The ceilings as they come, of which each is also put into a list."""
    for ceiling in found:
        kept.append(ceiling)
        yield ceiling


def _elements(tokens: int, heads: int, kv_heads: int, keys: int, head_dim: int, value_dim: int) -> int:
    """Elements of a dataset and of `out`."""
    return (head_dim + value_dim) * (heads * tokens + kv_heads * keys)


def _exact_rows(plan: Plan, dataset: Path, rows: int, seed: int) -> list[ExactRow]:
    borders = range(plan.chunk_rows, plan.problem.out_rows, plan.chunk_rows)
    return list(recompute_rows(plan.problem, Dataset.open(dataset), borders=borders, rows=rows, seed=seed))


def competitors(plan: Plan, place: Path, client: Client, options: dict[str, Any], stack: ExitStack) -> list[Competitor]:
    """All competitors, in the order of the table. What cannot run here says so when its turn comes.

    What a competitor needs beyond the dataset in `place` is removed when `stack` is closed.
    """
    dataset = place / "qkv.zarr"
    options = {**options, "device_memory": plan.device_memory, "host_memory": plan.host_memory}  # the same in every run
    found: list[Competitor] = []
    needed, free = Inputs.nbytes(plan.problem), psutil.virtual_memory().available
    inputs = None
    if needed + plan.peak_host <= free:
        inputs = Inputs.load(Dataset.open(dataset), plan.problem, plan.device)
        found += [*_resident_calls(inputs), QueryStationaryLoop(inputs, plan.kernel)]
    else:
        reason = f"needs {format_bytes(needed)} of host memory beside oocattn, {format_bytes(free)} are free"
        found += [SkippedCompetitor(RESIDENT, reason), SkippedCompetitor(QueryStationaryLoop.name, reason)]
    files = ceilings.chunk_files(dataset)
    return [
        *found,
        _from_memory(plan, dataset, client, options, stack),
        OutOfCore(PAGE_CACHE, dataset, client, options, before=lambda: ceilings.read_files(files)),
        OutOfCore("oocattn, cold disk", dataset, client, options, before=lambda: ceilings.drop_from_cache(files)),
        *_stream_cqsa(inputs),
    ]


def _resident_calls(inputs: Inputs) -> list[Competitor]:
    """The call that a user would make, and FlashAttention-3's where it is installed and the mask is not plain."""
    try:
        found = ResidentCall(inputs)
    except OocattnError as error:
        return [SkippedCompetitor(RESIDENT, str(error))]
    plain = inputs.device == "cpu" or found.mask.is_plain or fa3_library() is None
    return [found] if plain else [found, Fa3Call(inputs)]


def _from_memory(plan: Plan, dataset: Path, client: Client, options: dict[str, Any], stack: ExitStack) -> Competitor:
    """oocattn with dataset and result in memory, if there is room."""
    name = "oocattn, from memory"
    if not MEMORY_FOLDER.is_dir():
        return SkippedCompetitor(name, f"there is no {MEMORY_FOLDER}")
    needed = Inputs.nbytes(plan.problem) + plan.scratch_disk
    free = min(shutil.disk_usage(MEMORY_FOLDER).free, psutil.virtual_memory().available - plan.peak_host)
    if 1.1 * needed > free:
        return SkippedCompetitor(
            name, f"needs {format_bytes(1.1 * needed)} in {MEMORY_FOLDER}, {format_bytes(max(0, free))} are free"
        )
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=MEMORY_FOLDER)))
    shutil.copytree(dataset, place / dataset.name)
    return OutOfCore(name, place / dataset.name, client, options, before=lambda: None)


def _stream_cqsa(inputs: Inputs | None) -> list[Competitor]:
    """The package of the method's authors, where it and a GPU are there."""
    if inputs is None or inputs.device != "cuda" or importlib.util.find_spec("stream_cqsa") is None:
        return []
    try:
        return [StreamCqsa(inputs)]
    except Exception as error:
        return [SkippedCompetitor("stream_cqsa", _words(error))]


class _Entrant:
    """A competitor in the rounds, and its row of the table. One that failed has no figures."""

    def __init__(self, competitor: Competitor, exact: Sequence[ExactRow]) -> None:
        self.competitor, self.row = competitor, Row(competitor.name)
        self._places = [(row.batch, row.head, row.token) for row in exact]
        self._expected = np.stack([row.out for row in exact])

    def run(self, *, timed: bool) -> float:
        """One run and its seconds."""
        self.competitor.prepare()
        _reset_peak()
        start = time.perf_counter()
        report = self.competitor.run()
        seconds = time.perf_counter() - start
        peak = max(self.row.device_peak or 0, _device_peak()) or None
        difference = self.competitor.rows(self._places) - self._expected
        lengths = np.linalg.norm(self._expected, axis=1)
        errors = np.linalg.norm(difference, axis=1) / np.where(lengths, lengths, 1.0)  # rows without a key are 0
        rounds = (*self.row.seconds, seconds) if timed else self.row.seconds
        self.row = Row(self.row.name, rounds, peak, float(np.sqrt(np.mean(errors**2))), report=report)
        return seconds


def _rounds(entrants: Sequence[_Entrant], repeats: int, warm_up: bool) -> Iterator[Progress]:
    """Run all rounds, after an untimed one with `warm_up`. A competitor that fails ends alone."""
    for number in range(0 if warm_up else 1, repeats + 1):
        name = f"round {number} of {repeats}" if number else "warm-up"
        for entrant in (entrant for entrant in entrants if not entrant.row.note):
            what, start = f"{name}, {entrant.competitor.name}", time.perf_counter()
            try:
                seconds = entrant.run(timed=number > 0)
            except Exception as error:
                entrant.row = Row(entrant.competitor.name, note=_words(error))
                what, seconds = f"{what}: {entrant.row.note}", time.perf_counter() - start
            yield Progress(what, seconds)


def _words(error: Exception) -> str:
    """An error as a cell of the table."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text or "can't allocate" in text:
        return "out of memory"
    return text[:120] or type(error).__name__


def _reset_peak() -> None:
    """Free cached device memory, and measure its peak from here."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.init()  # before, there is no peak to reset
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _device_peak() -> int:
    """The most bytes that torch reserved on any GPU since `_reset_peak`."""
    return max((torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())), default=0)


def _check_room(folder: Path, elements: int, dtype: str) -> None:
    """Raise ProblemError unless a dataset and a result fit into `folder`. `elements` counts both."""
    if not folder.is_dir():
        raise ProblemError(f"folder {folder}: there is no such folder; make it, or name another with {named('folder')}")
    needed, free = elements * DTYPES[dtype] + ceilings.BYTES, free_disk(folder)
    if needed > free:
        raise ProblemError(
            f"folder {folder}: the dataset and a result take {format_bytes(needed)}, {format_bytes(free)} are free; name "
            f"another with {named('folder')}, or lower {named('tokens')}"
        )
