"""Blocks of rows of a result, of a second pass over its pairs and of its inputs: read, summed and compared.

Any thread may do that with any block. Each has memory of its own, which it uses again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import VECTORS, sign_vectors
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.direct import MOST_THREADS
from oocattn.storage.results.rows import RowReader
from oocattn.units import ceil_div
from oocattn.verification.differences import FOUND_BYTES, Differences
from oocattn.verification.judge import NEIGHBOURS, Bools, Judge, Piece
from oocattn.verification.noise import Array64, KeyTerms, WeightNoise
from oocattn.verification.row_sums import Array32, OutSums, Rows, RowSums, sums_bytes

BLOCK_ROWS = 1 << 17
"""Rows that a thread reads and compares at a time, at most: of fewer, Python's lock takes a larger part of the time."""

AHEAD = 2  # blocks that are begun for each thread, so that none waits for the next
LEAST_ROWS = NEIGHBOURS  # the fewest that are read at a time; of fewer, calls take longer than numbers


@dataclass(frozen=True)
class Compared:
    """A result, its problem and dataset, and the second pass over it, whose sign vectors are those of `seed`.

    `rounding` says whether the kernel of the result rounds softmax weights, `pass_rounding` whether that of the pass does.
    """

    problem: Problem
    dataset: Dataset
    result: Mapping[str, RowReader]
    second: Mapping[str, RowReader]
    seed: int
    rounding: bool
    pass_rounding: bool

    def nbytes(self, rows: int, threads: int) -> int:
        """Host memory, in bytes, to compare rows in so many threads, each of which has blocks of `rows` rows."""
        problem = self.problem
        rows = min(rows, max(problem.out_rows, problem.keys))
        columns, out = max(problem.head_dim, problem.value_dim), self.result["out"].dtype
        of_row = columns * max(problem.itemsize, out.itemsize) + VECTORS * 4 + 2 * 4 + 7 * 8
        of_row += 34 * 8 + 2 * columns  # numbers of each row, and the keys that it attends; where NaN is looked for
        of_thread = rows * of_row + sums_bytes(out.name, columns, VECTORS, rows)
        of_thread += (AHEAD + 1) * FOUND_BYTES
        decoding = max(array.decode_bytes for array in self.dataset.arrays.values()) * ceil_div(threads, MOST_THREADS)
        of_readers = max(reader.nbytes(rows) for reader in (*self.result.values(), *self.second.values()))
        of_bias = 13 * problem.keys if problem.bias_heads else 0
        return threads * of_thread + max(decoding, of_readers) + of_bias


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a head of `out` or of an input."""

    batch: int
    head: int
    start: int
    stop: int

    @classmethod
    def all_of(cls, batch: int, head: int, rows: int, step: int) -> Iterator[Block]:
        """The blocks of a head, of at most `step` rows."""
        for start in range(0, rows, step):
            yield cls(batch, head, start, min(start + step, rows))

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start

    @property
    def halves(self) -> tuple[Block, Block]:
        """Its first and its other half."""
        middle = (self.start + self.stop) // 2
        return replace(self, stop=middle), replace(self, start=middle)


class Norms(NamedTuple):
    """The norms of some rows: the largest square, the sum of the squares, and how many rows these are."""

    largest: float
    total: float
    rows: int


class _Memory:
    """What a thread reads into, and sums with."""

    def __init__(self, given: Compared, rows: int) -> None:
        problem, out = given.problem, given.result["out"].dtype
        columns = max(problem.head_dim, problem.value_dim)
        self._wide = np.empty(rows * columns * max(problem.itemsize, out.itemsize), np.uint8)
        self._passed, self._lse, self._passed_lse = (np.empty(rows * count, np.float32) for count in (VECTORS, 1, 1))
        self.inputs = RowSums(problem.dtype, columns, rows)
        self.outs = OutSums(out.name, sign_vectors(given.seed, problem.value_dim).astype(np.float64), rows)

    def wide(self, rows: int, columns: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """For rows of q, k, v or `out`: the same memory for all of them."""
        found = np.dtype(dtype)
        return self._wide[: rows * columns * found.itemsize].view(found).reshape(rows, columns)

    def narrow(self, rows: int) -> tuple[Array32, Array32, Array32]:
        """For `out` of the pass, lse of the result and lse of the pass."""
        return self._passed[: rows * VECTORS].reshape(rows, VECTORS), self._lse[:rows], self._passed_lse[:rows]


class BlockReader:
    """Reads blocks of at most `block_rows` rows, and sums or compares them; the `most` rows that differ most are kept."""

    def __init__(self, given: Compared, block_rows: int, most: int) -> None:
        problem = given.problem
        self._given, self._problem, self._most = given, problem, most
        self._judge = Judge(problem, WeightNoise.of(problem, given.rounding, given.pass_rounding))
        self._rows = min(block_rows, max(problem.out_rows, problem.keys))
        self._of_thread, self._decoding = threading.local(), threading.Lock()

    def measure(self, name: str, block: Block) -> Norms:
        """The norms of rows of k or v, of those that are finite."""
        squares = self._squares(name, block)
        finite = squares[np.isfinite(squares)]
        return Norms(float(np.max(finite, initial=0.0)), float(finite.sum()), len(finite))

    def compare(self, block: Block, keys: KeyTerms) -> Differences:
        """Compare rows of `out`. Raises IntegrityError where the pass cannot be read."""
        problem, given, memory, found = self._problem, self._given, self._memory, Differences(self._most)
        query_head = block.head if problem.heads is None else problem.heads[block.head]
        asked = range(problem.rows_asked[0] + block.start, problem.rows_asked[0] + block.stop)
        norms = np.sqrt(self._squares("q", Block(block.batch, query_head, asked.start, asked.stop)))
        out = memory.wide(block.rows, problem.value_dim, given.result["out"].dtype)
        passed, lse, passed_lse = memory.narrow(block.rows)
        readable = self._read_result(block, out, lse)
        self._read(given.second["out"], block, passed)
        self._read(given.second["lse"], block, passed_lse)
        piece = Piece(block.batch, query_head, np.arange(asked.start, asked.stop), norms, out, lse, passed, passed_lse)
        with np.errstate(all="ignore"):  # NaN and Inf flow as they come
            sigmas = self._judge.sigmas(piece, keys, memory.outs, found)
        sigmas[~readable] = np.inf
        found.see_rows(sigmas, (block.batch * problem.out_heads + block.head) * problem.out_rows + block.start)
        return found

    @property
    def _memory(self) -> _Memory:
        """That of this thread."""
        found: _Memory | None = getattr(self._of_thread, "memory", None)
        if found is None:
            found = self._of_thread.memory = _Memory(self._given, self._rows)
        return found

    def _squares(self, name: str, block: Block) -> Array64:
        """The squares of the norms of rows of an input."""
        problem, memory, array = self._problem, self._memory, self._given.dataset.arrays[name]
        columns = problem.value_dim if name == "v" else problem.head_dim
        rows = memory.wide(block.rows, columns, numpy_dtype(problem.dtype))
        with nullcontext() if array.direct else self._decoding:
            array.read_rows(block.batch, block.head, block.start, block.stop, rows)
        with np.errstate(all="ignore"):
            return memory.inputs.squares(rows)

    def _read(self, reader: RowReader, block: Block, into: npt.NDArray[Any]) -> None:
        with nullcontext() if reader.mapped else self._decoding:
            reader.read(block.batch, block.head, block.start, into)

    def _read_result(self, block: Block, out: Rows, lse: Array32) -> Bools:
        """Read rows of the result. Which could be read: [rows]; others are NaN.

        Where a part is damaged, its rows are looked for by halves.
        """
        try:
            self._read(self._given.result["out"], block, out)
            self._read(self._given.result["lse"], block, lse)
        except IntegrityError:
            if block.rows > LEAST_ROWS:
                lower, upper = block.halves
                below = self._read_result(lower, out[: lower.rows], lse[: lower.rows])
                return np.concatenate([below, self._read_result(upper, out[lower.rows :], lse[lower.rows :])])
            out[...], lse[...] = np.nan, np.nan
            return np.zeros(block.rows, bool)
        return np.ones(block.rows, bool)
