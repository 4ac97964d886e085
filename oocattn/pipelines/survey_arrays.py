"""The arrays that a survey adds to a result, made of what its pass leaves: columns of each row, and sums over rows."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.cores import count_cores
from oocattn.errors import IntegrityError
from oocattn.kernels.reductions import make_reduction
from oocattn.kernels.reductions.base import RowReduction
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import Reduced
from oocattn.storage.files.durable import page_aligned
from oocattn.storage.make.create import (
    OwnStore,
    Separator,
    chunk_selection,
    create_array,
    out_dimensions,
    sync_metadata,
    write_chunk,
)
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import open_array
from oocattn.storage.results.added import Added
from oocattn.storage.results.rows import RowReader
from oocattn.threads import ThreadPool, map_in_order
from oocattn.units import ceil_div

FAR_FROM_1 = 0.02
"""By how much the sum of a row's weights may be off: float32 scores of 1e4 are exact to 1e-3."""

CHUNK_BYTES = 4 << 20
"""Of a chunk, at most: several of them are held at a time."""

HELD_CHUNKS = 5
"""That a thread holds: two that it makes, a part of the rows of which, and what it computes of that."""

MOST_THREADS = 8
"""That make chunks at a time."""

THREAD_BYTES = 16 << 20
"""Of arrays for which there is one thread: less is made before others have begun."""

MEAN_HEAD = "mean_head"
"""The dimension of an average over heads: xarray opens no group in which one name has two sizes."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class PassArrays:
    """What a pass left at a place: `out` [B, H, N, columns], `lse` [B, H, N], and the arrays of sums over rows.

    `first` is the lse [B, H, N] of the result that it is over.
    """

    place: Path
    first: zarr.Array[Any]
    problem: Problem
    reduced: Sequence[Reduced]

    def array(self, name: str) -> zarr.Array[Any]:
        """One of them, through memory maps. Raises IntegrityError where it is missing."""
        found = open_array(MappedStore(self.place, read_only=True), name, str(self.place))
        if found is None:
            raise IntegrityError(f"{self.place} has no array {name!r}: ask for the survey again")
        return found

    def columns(self, asked: Reduced) -> slice:
        """The columns of `out` that a reduction has."""
        before = itertools.takewhile(lambda each: each != asked, self.reduced)
        first = sum(each.columns for each in before)
        return slice(first, first + asked.columns)


def wanted_arrays(problem: Problem, reduced: Sequence[Reduced], *, mean_heads: bool) -> dict[str, Added]:
    """The arrays that reductions become, by name. With `mean_heads` those that may be are averaged over heads."""
    found: dict[str, Added] = {}
    rows = *out_dimensions(problem)[:3], "rank"
    for asked in reduced:
        reduction = make_reduction(asked)
        if isinstance(reduction, RowReduction):
            for name, (row, dtype) in reduction.arrays.items():
                shape = *problem.out_shape[:3], *row
                found[name] = Added(shape, dtype, rows[: len(shape)], {})
        else:
            heads, (batch, head) = problem.out_heads, rows[:2]
            if mean_heads and reduction.may_average and heads > 1:
                heads, head = 1, MEAN_HEAD
            shape = problem.batch, heads, *reduction.shape(problem.out_rows, problem.keys)
            about = reduction.about(problem.out_rows, problem.keys)
            found[asked.name] = Added(shape, "float32", (batch, head, *reduction.dimensions), about)
    return found


@dataclass(frozen=True)
class Making:
    """Makes the wanted arrays in a new group at `folder`; `separator` stands between the numbers in their chunks' keys.

    `room` are bytes of memory that its threads may take. `check` is called before each chunk is read, from any of them; what
    it raises ends it.
    """

    found: PassArrays
    wanted: Mapping[str, Added]
    folder: Path
    separator: Separator
    room: int
    check: Callable[[], object]

    def make(self) -> None:
        """Make all arrays, durably."""
        group = zarr.create_group(OwnStore(self.folder), zarr_format=3)
        with ThreadPool(self._threads, "oocattn-survey") as pool:
            self._warn_of_sums(pool)
            for _ in map_in_order(pool, lambda chunk: chunk(), ((chunk,) for chunk in self._chunks(group)), self._threads):
                pass
        sync_metadata(self.folder)

    @property
    def _threads(self) -> int:
        nbytes = sum(math.prod(each.shape) * np.dtype(each.dtype).itemsize for each in self.wanted.values())
        most = min(MOST_THREADS, count_cores(), ceil_div(nbytes, THREAD_BYTES), self.room // (HELD_CHUNKS * CHUNK_BYTES))
        return max(1, most)

    def _chunks(self, group: zarr.Group) -> Iterator[Callable[[], object]]:
        """Calls that write the chunks of all arrays, one after another of each head."""
        for asked in self.found.reduced:
            reduction = make_reduction(asked)
            if isinstance(reduction, RowReduction):
                yield from self._row_chunks(group, asked, reduction)
            else:
                yield from self._copies(group, asked.name)

    def _warn_of_sums(self, pool: ThreadPool) -> None:
        """Warn of rows whose weights do not sum to 1. A learnable sink takes a part of them."""
        if self.found.problem.given.learnable_sink is not None:
            return
        lse = RowReader("lse", self.found.array("lse"), str(self.found.place))
        first = RowReader("lse", self.found.first, "the result")
        (batches, heads, rows), step = lse.shape, CHUNK_BYTES // np.dtype(np.float32).itemsize

        def count(batch: int, head: int, start: int) -> int:
            self.check()
            sums = np.empty(min(step, rows - start), np.float32)  # logarithms of sums
            shifts = np.empty_like(sums)
            for reader, into in ((lse, sums), (first, shifts)):
                reader.read(batch, head, start, into)
            with np.errstate(over="ignore"):
                return int((np.isfinite(shifts) & ~(np.abs(np.expm1(sums)) <= FAR_FROM_1)).sum())

        places = itertools.product(range(batches), range(heads), range(0, rows, step))
        off = sum(map_in_order(pool, count, places, self._threads))
        if off:
            logger.warning("the weights of %d rows do not sum to 1: their log-sum-exp is wrong; verify the result", off)

    def _row_chunks(self, group: zarr.Group, asked: Reduced, reduction: RowReduction) -> Iterator[Callable[[], object]]:
        """Calls that write the arrays that a reduction has of each row: a chunk of each."""
        readers = tuple(RowReader(name, self.found.array(name), str(self.found.place)) for name in ("out", "lse"))
        (batches, heads, total, _), columns = readers[0].shape, self.found.columns(asked)
        widest = max(math.prod(row) * np.dtype(dtype).itemsize for row, dtype in reduction.arrays.values())
        step = min(total, max(1, CHUNK_BYTES // widest))
        arrays = {name: self._create(group, name, step) for name in reduction.arrays}

        def write(batch: int, head: int, start: int) -> None:
            chunks = {
                name: page_aligned((1, 1, min(step, total - start), *row), dtype)
                for name, (row, dtype) in reduction.arrays.items()
            }
            of_rows = {name: chunk[0, 0] for name, chunk in chunks.items()}
            self._fill(of_rows, readers, (batch, head, start), columns, reduction)
            for name, chunk in chunks.items():
                write_chunk(arrays[name], (batch, head, start // step, *(0 for _ in chunk.shape[3:])), chunk)

        for place in itertools.product(range(batches), range(heads), range(0, total, step)):
            yield partial(write, *place)

    def _fill(
        self,
        chunks: Mapping[str, NDArray[Any]],
        readers: Sequence[RowReader],
        place: tuple[int, int, int],
        columns: slice,
        reduction: RowReduction,
    ) -> None:
        """Make what the arrays of a reduction have of the rows from a place (batch entry, head, row) on."""
        (out, lse), (batch, head, start), rows = readers, place, len(next(iter(chunks.values())))
        at_a_time = max(1, CHUNK_BYTES // (4 * out.shape[3]))
        for first in range(0, rows, at_a_time):
            self.check()
            part = slice(first, min(first + at_a_time, rows))
            sums = np.empty(part.stop - first, np.float32)  # logarithms
            of_rows = np.empty((len(sums), out.shape[3]), np.float32)
            for reader, into in ((out, of_rows), (lse, sums)):
                reader.read(batch, head, start + first, into)
            for name, values in reduction.values(of_rows[:, columns], np.isnan(sums)).items():
                chunks[name][part] = values

    def _copies(self, group: zarr.Group, name: str) -> Iterator[Callable[[], object]]:
        """Calls that write the chunks of a reduction along rows, averaged over heads where it has one head of several."""
        source, heads = self.found.array(name), self.wanted[name].shape[1]
        array = self._create(group, name, source.chunks[2])

        def write(coordinates: tuple[int, ...]) -> None:
            self.check()
            selection = chunk_selection(array, coordinates)
            values = np.asarray(source[selection], np.float32)
            if heads < source.shape[1]:
                total = values.astype(np.float64)
                for head in range(1, source.shape[1]):
                    total += np.asarray(source[(selection[0], slice(head, head + 1), *selection[2:])])
                values = (total / source.shape[1]).astype(np.float32)
            write_chunk(array, coordinates, values)

        for coordinates in itertools.product(*map(range, array.cdata_shape)):
            yield partial(write, coordinates)

    def _create(self, group: zarr.Group, name: str, chunk_rows: int) -> zarr.Array[Any]:
        wanted = self.wanted[name]
        array = create_array(group, name, wanted.shape, wanted.dtype, chunk_rows, wanted.dimensions, self.separator)
        return array.update_attributes(wanted.attributes)
