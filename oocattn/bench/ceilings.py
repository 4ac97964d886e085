"""The best rates of this machine: kernel, copies to a GPU, disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from oocattn.bench.records import COLD_READ, WARM_READ, WRITE, Ceiling
from oocattn.planning.kernel_rates import Sample, copy_rates, kernel_rate
from oocattn.planning.plan import Plan
from oocattn.storage.files.durable import sync_descriptor
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import advise, open_regular
from oocattn.threads import ThreadPool

BYTES = 256 << 20
"""Read and written at most to measure a rate."""

PIECE = 8 << 20  # bytes of one read or write
READERS = 4  # threads that read, for one does not keep a fast disk busy


def measure_ceilings(plan: Plan, dataset: Path, folder: Path) -> Iterator[Ceiling]:
    """Measure the plan's kernel, copies to a GPU where it has one, and the disk of a dataset and a folder."""
    yield _kernel_ceiling(plan)
    yield from _copy_ceilings(plan)
    yield from _disk_ceilings(dataset, folder)


def _kernel_ceiling(plan: Plan) -> Ceiling:
    """The plan's kernel on random data, on a GPU at the plan's tiles and with the clock of a long run."""
    sample = Sample.of(plan.problem)
    if plan.device == "cpu":
        return Ceiling(f"kernel {plan.kernel}", kernel_rate(plan.kernel, sample), "FLOP/s")
    rate = kernel_rate(plan.kernel, sample, rows=plan.tiles.query, keys=plan.tiles.key, settled=True)
    return Ceiling(f"kernel {plan.kernel}, {plan.tiles.query:,} queries by {plan.tiles.key:,} keys", rate, "FLOP/s")


def _copy_ceilings(plan: Plan) -> Iterator[Ceiling]:
    """Pinned copies to a GPU and back."""
    rates = copy_rates(0) if plan.device == "cuda" else ()
    for name, rate in zip(("host to device, pinned", "device to host, pinned"), rates, strict=False):
        yield Ceiling(name, rate, "B/s")


def _disk_ceilings(dataset: Path, folder: Path) -> Iterator[Ceiling]:
    """The dataset read from disk and from the page cache, and a file written."""
    files, total = [], 0
    for file in chunk_files(dataset):
        if total < BYTES:
            files.append(file)
            total += file.stat().st_size
    drop_from_cache(files)
    for name in (COLD_READ, WARM_READ):
        yield Ceiling(name, total / _seconds(lambda: read_files(files)), "B/s")
    yield Ceiling(WRITE, BYTES / _seconds(lambda: _write(folder / "written")), "B/s")
    (folder / "written").unlink()


def chunk_files(dataset: Path) -> list[Path]:
    """The chunk files of a dataset: all its files but the metadata."""
    return sorted(path for path in dataset.rglob("*") if path.is_file() and path.name != "zarr.json")


def drop_from_cache(files: Iterable[Path]) -> None:
    """Drop files from the page cache, once they are on disk. One in memory drops nothing."""
    for file in files:
        with open_regular(file) as descriptor:
            sync_descriptor(descriptor, file)
            advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(files: Iterable[Path]) -> None:
    """Read files whole, four at a time, into buffers that are reused."""
    with ThreadPool(READERS, "oocattn-ceiling") as pool:
        for _ in pool.map(_read, files):
            pass


def _read(path: Path) -> None:
    buffer = bytearray(PIECE)
    with name_failure("read", path), open(path, "rb", buffering=0) as file:
        advise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        while file.readinto(buffer):
            pass


def _write(path: Path) -> None:
    piece = os.urandom(PIECE)
    with name_failure("write", path), open(path, "wb", buffering=0) as file:
        for _ in range(BYTES // PIECE):
            file.write(piece)
        sync_descriptor(file.fileno(), path)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
