"""The arrays that a survey adds to a result, made of what its pass leaves: columns of each row, and sums over rows."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from oocattn.errors import IntegrityError
from oocattn.kernels.reductions import make_reduction
from oocattn.kernels.reductions.base import RowReduction
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import Reduced
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

FAR_FROM_1 = 0.02
"""By how much the sum of a row's weights may be off: float32 scores of 1e4 are exact to 1e-3."""

CHUNK_BYTES = 4 << 20
"""Of a chunk, at most: several of them are held at a time."""

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

    `check` is called before each chunk is read; what it raises ends it.
    """

    found: PassArrays
    wanted: Mapping[str, Added]
    folder: Path
    separator: Separator
    check: Callable[[], object]

    def make(self) -> None:
        """Make all arrays, durably."""
        group = zarr.create_group(OwnStore(self.folder), zarr_format=3)
        self._warn_of_sums()
        for asked in self.found.reduced:
            reduction = make_reduction(asked)
            if isinstance(reduction, RowReduction):
                self._make_rows(group, asked, reduction)
            else:
                self._copy(group, asked.name)
        sync_metadata(self.folder)

    def _warn_of_sums(self) -> None:
        """Warn of rows whose weights do not sum to 1. A learnable sink takes a part of them."""
        if self.found.problem.given.learnable_sink is not None:
            return
        lse = RowReader("lse", self.found.array("lse"), str(self.found.place))
        first = RowReader("lse", self.found.first, "the result")
        (batches, heads, rows), step, off = lse.shape, CHUNK_BYTES // np.dtype(np.float32).itemsize, 0
        for batch, head, start in itertools.product(range(batches), range(heads), range(0, rows, step)):
            self.check()
            sums = np.empty(min(step, rows - start), np.float32)  # logarithms of sums
            shifts = np.empty_like(sums)
            for reader, into in ((lse, sums), (first, shifts)):
                reader.read(batch, head, start, into)
            with np.errstate(over="ignore"):
                off += int((np.isfinite(shifts) & ~(np.abs(np.expm1(sums)) <= FAR_FROM_1)).sum())
        if off:
            logger.warning("the weights of %d rows do not sum to 1: their log-sum-exp is wrong; verify the result", off)

    def _make_rows(self, group: zarr.Group, asked: Reduced, reduction: RowReduction) -> None:
        """Write the arrays that a reduction has of each row."""
        out, lse = (RowReader(name, self.found.array(name), str(self.found.place)) for name in ("out", "lse"))
        widest = max(math.prod(row) * np.dtype(dtype).itemsize for row, dtype in reduction.arrays.values())
        step = min(out.shape[2], max(1, CHUNK_BYTES // widest))
        at_a_time = max(1, CHUNK_BYTES // (4 * out.shape[3]))
        arrays, columns = {name: self._create(group, name, step) for name in reduction.arrays}, self.found.columns(asked)
        for batch, head, start in itertools.product(*map(range, out.shape[:2]), range(0, out.shape[2], step)):
            rows = min(step, out.shape[2] - start)
            chunks = {name: np.empty((1, 1, rows, *row), dtype) for name, (row, dtype) in reduction.arrays.items()}
            for first in range(0, rows, at_a_time):
                self.check()
                part = slice(first, min(first + at_a_time, rows))
                sums = np.empty(part.stop - first, np.float32)  # logarithms
                of_rows = np.empty((len(sums), out.shape[3]), np.float32)
                for reader, into in ((out, of_rows), (lse, sums)):
                    reader.read(batch, head, start + first, into)
                for name, values in reduction.values(of_rows[:, columns], np.isnan(sums)).items():
                    chunks[name][0, 0, part] = values
            for name, chunk in chunks.items():
                write_chunk(arrays[name], (batch, head, start // step, *(0 for _ in chunk.shape[3:])), chunk)

    def _copy(self, group: zarr.Group, name: str) -> None:
        """Write the array of a reduction along rows, averaged over heads where it has one head of several."""
        source, heads = self.found.array(name), self.wanted[name].shape[1]
        array = self._create(group, name, source.chunks[2])
        for coordinates in itertools.product(*map(range, array.cdata_shape)):
            self.check()
            selection = chunk_selection(array, coordinates)
            values = np.asarray(source[selection], np.float32)
            if heads < source.shape[1]:
                total = values.astype(np.float64)
                for head in range(1, source.shape[1]):
                    total += np.asarray(source[(selection[0], slice(head, head + 1), *selection[2:])])
                values = (total / source.shape[1]).astype(np.float32)
            write_chunk(array, coordinates, values)

    def _create(self, group: zarr.Group, name: str, chunk_rows: int) -> zarr.Array[Any]:
        wanted = self.wanted[name]
        array = create_array(group, name, wanted.shape, wanted.dtype, chunk_rows, wanted.dimensions, self.separator)
        return array.update_attributes(wanted.attributes)
