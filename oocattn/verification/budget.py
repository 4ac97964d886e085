"""What `verify` holds at a time, and in how many threads it works, within a budget of host memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from oocattn.cores import count_cores
from oocattn.errors import BudgetError
from oocattn.naming import named
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.checksums import Checksums
from oocattn.storage.results.rows import RowReader
from oocattn.units import ceil_div, format_bytes
from oocattn.verification.all_rows import MOST_KEPT, MOST_RECOMPUTED, Sizes
from oocattn.verification.blocks import BLOCK_ROWS, LEAST_ROWS, Compared
from oocattn.verification.chunk_cache import chunk_bytes, most_chunks
from oocattn.verification.recompute import GROUP_ROWS, KEY_ROWS, Tiles, most_key_rows, recompute_bytes

MOST_THREADS = 16  # of more, each waits for Python's lock
MOST_COMPARING = 8  # the same, where all rows are compared: measured on 16 cores
LEAST_KEYS = 64  # keys of the smallest tile that K and V are streamed in
STEP_BYTES = 8 << 20
"""Read at a time for a checksum where chunks are plain files, at most: it stays in the processor's cache. Else a part is."""

LEAST_STEP_BYTES = 64 << 10  # the same, at least: below it, calls take longer than bytes
BASE_BYTES = 4 << 20  # for what does not grow with tiles and steps: Zarr's and Python's own
ROW_BYTES = 8 << 10  # for a row in the sample, in the certificate and on its page
PLACE_BYTES = 1 << 10  # for a suspected row, while it waits to be recomputed
PART_BYTES = 128  # for the checksum of a part, as it is read and parsed


@dataclass(frozen=True)
class Step:
    """Rows that each of some threads reads at a time."""

    rows: int
    threads: int


@dataclass(frozen=True)
class Fitted:
    """What is held at a time: of the sample, of each array for checksums, and of all rows where these are compared."""

    sample: Tiles
    steps: Mapping[str, Step]
    all_rows: Sizes | None


def fit(
    problem: Problem,
    dataset: Dataset,
    readers: Mapping[str, RowReader],
    checksums: Mapping[str, Checksums],
    rows: int,
    second: Compared | None,
    host_memory: int,
) -> Fitted:
    """What to hold at a time within the budget. Raises BudgetError where the least does not fit."""
    rows = min(rows, problem.rows)
    always = BASE_BYTES + ROW_BYTES * rows + sum(PART_BYTES * len(recorded) for recorded in checksums.values())
    always += ROW_BYTES * MOST_KEPT + PLACE_BYTES * MOST_RECOMPUTED if second is not None else 0
    sizes, one_row = _Sizes(always, host_memory), max(reader.nbytes(1) for reader in readers.values())

    def recomputing(key_rows: int, rows: int, threads: int) -> int:
        return one_row + recompute_bytes(problem, dataset, rows, key_rows, threads)

    def tiles(key_rows: int, group_rows: int, rows: int) -> Tiles:
        threads = sizes.fit_threads(partial(recomputing, key_rows, rows))
        of_chunk, beside = chunk_bytes(dataset, key_rows), recomputing(key_rows, rows, threads)
        chunks = sizes.fit(most_chunks(dataset, key_rows, threads), 0, lambda count: beside + count * of_chunk)
        return Tiles(key_rows, group_rows, threads, chunks)

    key_rows = sizes.fit(most_key_rows(problem, rows), LEAST_KEYS, partial(recomputing, rows=rows, threads=1))
    sample = tiles(key_rows, GROUP_ROWS, rows)
    steps = {name: _fit_step(sizes, readers[name], recorded.rows) for name, recorded in checksums.items()}
    all_rows = None
    if second is not None:
        block_rows = sizes.fit(BLOCK_ROWS, LEAST_ROWS, partial(second.nbytes, threads=1))
        key_rows = min(key_rows, KEY_ROWS)
        group_rows = sizes.fit(GROUP_ROWS, 1, partial(recomputing, key_rows, threads=1))
        comparing = sizes.fit_threads(partial(second.nbytes, block_rows), MOST_COMPARING)
        all_rows = Sizes(block_rows, comparing, tiles(key_rows, group_rows, group_rows))
    sizes.check()
    return Fitted(sample, steps, all_rows)


class _Sizes:
    """Sizes that fit into a budget beside what is `always` held."""

    def __init__(self, always: int, host_memory: int) -> None:
        self._always, self._host_memory, self._least = always, host_memory, 0

    def fit(self, most: int, fewest: int, nbytes: Callable[[int], int]) -> int:
        """The largest size of `most`, its half, and so on, that fits, or the `fewest`."""
        size = most
        while size > fewest and self._always + nbytes(size) > self._host_memory:
            size = max(size // 2, fewest)
        self._least = max(self._least, self._always + nbytes(size))
        return size

    def fit_threads(self, nbytes: Callable[[int], int], most: int = MOST_THREADS) -> int:
        """The `most` threads that fit, or one."""
        return self.fit(min(count_cores(), most), 1, nbytes)

    def check(self) -> None:
        """Raise BudgetError where something did not fit."""
        if self._least > self._host_memory:
            raise BudgetError(
                f"{named('host_memory')} {format_bytes(self._host_memory)} is too small to verify this result: the smallest "
                f"that works is {ceil_div(self._least, 1 << 20)}MiB"
            )


def _fit_step(sizes: _Sizes, reader: RowReader, part: int) -> Step:
    """What to read at a time of an array whose checksums are of parts of `part` rows. Chunks are decoded one by one."""
    row = math.prod(reader.shape[3:]) * reader.dtype.itemsize
    most = min(part, reader.shape[2], max(1, STEP_BYTES // row) if reader.mapped else part)
    rows = sizes.fit(most, min(most, max(1, LEAST_STEP_BYTES // row)), reader.nbytes)
    nbytes = reader.nbytes(rows)
    return Step(rows, sizes.fit_threads(lambda threads: threads * nbytes) if reader.mapped else 1)
