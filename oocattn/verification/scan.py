"""Every row of a result beside a second pass over its pairs: by how many deviations of the noise they differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import VECTORS, sign_vectors
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.rows import RowReader
from oocattn.verification.attended import Int64s, attended_ranges, key_positions
from oocattn.verification.findings import MOST_ESCAPING, error_found
from oocattn.verification.noise import (
    SUSPICIOUS,
    Array64,
    KeyTerms,
    Quantiles,
    QueryTerms,
    WeightNoise,
    relative_noise,
    rounding_variance,
)

BLOCK_ROWS = 4096
"""Rows that are compared at a time, at most: their numbers stay in the processor's cache."""

DECODED_ROWS = 1 << 16  # the same, where chunks are decoded whole
LEAST_ROWS = 64  # the fewest that are compared at a time; of fewer, calls take longer than numbers

_NOT_COMPARED = math.nextafter(SUSPICIOUS, math.inf)  # of rows of NaN or Inf: suspected after all that differ

Bools = npt.NDArray[np.bool_]
Stored = Mapping[str, npt.NDArray[Any]]  # some rows of `out` and lse


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

    @property
    def most_rows(self) -> int:
        """Rows to compare at a time, at most."""
        return BLOCK_ROWS if all(reader.mapped for reader in self._readers) else DECODED_ROWS

    def nbytes(self, rows: int) -> int:
        """Host memory, in bytes, to compare `rows` rows at a time."""
        problem = self.problem
        tile, rows = min(rows, max(problem.out_rows, problem.keys)), min(rows, problem.out_rows)
        of_out = problem.value_dim * (3 * 8 + 8)  # in float64; variances and their places
        of_query = max(problem.head_dim, problem.value_dim) * (problem.itemsize + 2 * 8)
        columns = 8 * (6 * VECTORS + 60)  # of the pass, numbers of each row, and the keys that they attend
        decoding = max(array.decode_bytes for array in self.dataset.arrays.values())
        of_bias = 13 * problem.keys if problem.bias_heads else 0
        stored = sum(math.prod(reader.shape[3:]) * reader.dtype.itemsize for reader in self._readers)
        reading = max(decoding, *(reader.nbytes(rows) for reader in self._readers))  # one after another
        return tile * of_query + rows * (of_out + columns + stored) + reading + of_bias

    @property
    def _readers(self) -> Iterable[RowReader]:
        return itertools.chain(self.result.values(), self.second.values())


class Scan:
    """Compares rows block by block, and keeps the `most` that differ most.

    `worst` is the largest difference of rows that are not suspected, in standard deviations; `noise` has such deviations of
    a number of the pass, relative to the norm of the row, `lse_noise` those of lse. `worst_rows` are counted over all heads.
    """

    def __init__(self, given: Compared, block_rows: int, most: int) -> None:
        problem = given.problem
        self._given, self._problem = given, problem
        self._block_rows, self._most = block_rows, most
        self._signs = sign_vectors(given.seed, problem.value_dim).astype(np.float64)
        self._weights = WeightNoise.of(problem, given.rounding, given.pass_rounding)
        self._worst_of = np.empty(0)
        self.worst_rows: Int64s = np.empty(0, np.int64)
        self.suspected, self.open, self.worst = 0, 0, 0.0
        self._most_noise = MOST_ESCAPING / error_found(1.0, VECTORS)
        self.noise, self.lse_noise = Quantiles(), Quantiles()
        self._longest: tuple[tuple[int, int], float, float] = ((-1, -1), 0.0, 0.0)

    def compare_head(self, batch: int, head: int) -> None:
        """Compare the rows of a head of `out`. Raises IntegrityError where the pass cannot be read."""
        problem = self._problem
        query_head = head if problem.heads is None else problem.heads[head]
        keys = self._key_terms(batch, query_head)
        for first in range(0, problem.out_rows, self._block_rows):
            tokens = np.arange(first, min(first + self._block_rows, problem.out_rows))
            stored, second = _buffers(self._given.result, len(tokens)), _buffers(self._given.second, len(tokens))
            readable = _read(self._given.result, (batch, head, first), stored)
            for name, array in second.items():
                self._given.second[name].read(batch, head, first, array)
            with np.errstate(all="ignore"):  # NaN and Inf flow as they come
                sigmas = self._compare(batch, query_head, tokens + problem.rows_asked[0], stored, second, keys)
            sigmas[~readable] = np.inf
            suspected = np.flatnonzero(sigmas > SUSPICIOUS)
            self.worst = max(self.worst, float(np.max(sigmas, initial=0.0, where=sigmas <= SUSPICIOUS)))
            if len(suspected):
                self._keep(sigmas[suspected], (batch * problem.out_heads + head) * problem.out_rows + tokens[suspected])

    def _keep(self, sigmas: Array64, rows: Int64s) -> None:
        """Count suspected rows, and keep the worst."""
        self.suspected += len(rows)
        all_sigmas, all_rows = np.concatenate([self._worst_of, sigmas]), np.concatenate([self.worst_rows, rows])
        kept = np.argsort(-all_sigmas, kind="stable")[: self._most]
        self._worst_of, self.worst_rows = all_sigmas[kept], all_rows[kept]

    def _compare(
        self, batch: int, query_head: int, asked: Int64s, stored: Stored, second: Stored, keys: KeyTerms
    ) -> Array64:
        """By how many standard deviations rows of a head differ from the pass at most, in any number: [rows], not NaN."""
        sinks = self._problem.given.learnable_sink
        sink = -np.inf if sinks is None else float(sinks[query_head])
        ranges = attended_ranges(self._problem, batch, asked)
        lse, total = stored["lse"].astype(np.float64), np.exp(second["lse"].astype(np.float64))
        passed = second["out"].astype(np.float64)
        alibi = self._alibi(batch, query_head, asked, ranges)
        rows = QueryTerms(self._query_norms(batch, query_head, asked), lse, alibi, abs(sink) if sinks is not None else 0.0)
        relative = relative_noise(self._problem, rows, keys) + self._weights.relative
        out = stored["out"].astype(np.float64)
        projected = out @ self._signs
        squares = np.maximum(np.einsum("nd,nd->n", out, out), np.einsum("nk,nk->n", passed, passed) / VECTORS)
        attended = (ranges[..., 1] - ranges[..., 0]).sum(axis=1)
        squares = np.maximum(squares, keys.value_square / np.maximum(attended, 1))  # by chance a row of few columns is small
        nothing = (stored["out"] == 0).all(axis=1) & (passed == 0).all(axis=1) & (total == 0) & (lse == sink)
        del out
        variance = rounding_variance(stored["out"]) + (self._weights.variance + relative**2) * squares
        off = np.abs(projected - passed).max(axis=1) / np.sqrt(variance)
        expected = -np.expm1(sink - lse) if sinks is not None else 1.0
        sigmas = np.maximum(off, np.abs(total - expected) / relative)
        comparable = np.isfinite(sigmas) & np.isfinite(relative)
        special = ~(np.isfinite(projected).any(axis=1) | np.isfinite(passed).any(axis=1))
        sigmas = np.where(comparable, sigmas, np.where(special, _NOT_COMPARED, np.inf))
        empty = _without_keys(ranges, keys)
        sigmas[empty] = np.where(nothing, 0.0, np.inf)[empty]
        self.lse_noise.add(relative[comparable & ~empty])
        counted = comparable & ~empty & (squares > 0)
        of_rows = np.sqrt(variance[counted] / squares[counted])
        self.noise.add(of_rows)
        self.open += int((of_rows > self._most_noise).sum())
        return sigmas

    def _key_terms(self, batch: int, query_head: int) -> KeyTerms:
        """What the keys of a query head are like."""
        problem = self._problem
        place = batch, query_head // (problem.query_heads // problem.kv_heads)
        if self._longest[0] != place:
            self._longest = place, *self._key_and_value(*place)
        largest, shut = 0.0, None
        if problem.bias_heads:
            bias = np.empty(problem.keys, np.float32)
            self._given.dataset.arrays["key_bias"].read_rows(batch, query_head % problem.bias_heads, 0, problem.keys, bias)
            largest = float(np.max(np.abs(bias), initial=0.0, where=np.isfinite(bias)))
            closed = np.isneginf(bias)
            del bias
            shut = np.concatenate([[0], np.cumsum(closed)]) if closed.any() else None
        return KeyTerms(*self._longest[1:], largest, shut)

    def _key_and_value(self, batch: int, kv_head: int) -> tuple[float, float]:
        """The norm of the longest key of a head, and the mean square of the norms of values, of those that are finite."""
        keys = self._norms_of("k", batch, kv_head, self._problem.head_dim)
        values = self._norms_of("v", batch, kv_head, self._problem.value_dim)
        longest = max(float(np.max(norms, initial=0.0)) for norms in keys)
        square = count = 0.0
        for norms in values:
            square, count = square + float(norms @ norms), count + len(norms)
        return longest, square / max(1.0, count)

    def _norms_of(self, name: str, batch: int, kv_head: int, columns: int) -> Iterator[Array64]:
        """The norms of the rows of k or v that are finite, block by block."""
        problem, rows = self._problem, min(self._block_rows, self._problem.keys)
        raw = np.empty((rows, columns), numpy_dtype(problem.dtype))
        for start in range(0, problem.keys, rows):
            tile = raw[: min(rows, problem.keys - start)]
            self._given.dataset.arrays[name].read_rows(batch, kv_head, start, start + len(tile), tile)
            with np.errstate(all="ignore"):
                norms = _norms(tile.astype(np.float64))
            yield norms[np.isfinite(norms)]

    def _query_norms(self, batch: int, query_head: int, asked: Int64s) -> Array64:
        problem = self._problem
        raw = np.empty((len(asked), problem.head_dim), numpy_dtype(problem.dtype))
        self._given.dataset.arrays["q"].read_rows(batch, query_head, int(asked[0]), int(asked[-1]) + 1, raw)
        return _norms(raw.astype(np.float64))

    def _alibi(self, batch: int, query_head: int, asked: Int64s, ranges: Int64s) -> Array64:
        """The size of the largest ALiBi bias of rows."""
        slopes = self._problem.given.alibi_slopes
        if slopes is None:
            return np.zeros(len(asked))
        slope = abs(float(slopes[query_head] if slopes.ndim == 1 else slopes[batch, query_head]))
        farthest = np.abs(key_positions(self._problem, batch, asked)[:, np.newaxis] - ranges.reshape(len(asked), -1)).max(
            axis=1
        )
        found: Array64 = slope * farthest.astype(np.float64)
        return found


def _norms(rows: Array64) -> Array64:
    found: Array64 = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return found


def _without_keys(ranges: Int64s, keys: KeyTerms) -> Bools:
    """Which rows, by the ranges that they attend, have no key but such that a bias of -inf shuts."""
    counts = (ranges[..., 1] - ranges[..., 0]).sum(axis=1)
    if keys.shut is not None:
        counts -= (keys.shut[ranges[..., 1]] - keys.shut[ranges[..., 0]]).sum(axis=1)
    found: Bools = counts == 0
    return found


def _buffers(readers: Mapping[str, RowReader], rows: int) -> dict[str, npt.NDArray[Any]]:
    return {name: np.empty((rows, *reader.shape[3:]), reader.dtype) for name, reader in readers.items()}


def _read(readers: Mapping[str, RowReader], place: tuple[int, int, int], into: Stored) -> Bools:
    """Read rows of a head from a place on. Which could be read: [rows]; others are NaN.

    Where a part is damaged, its rows are looked for by halves.
    """
    rows = len(into["lse"])
    try:
        for name, array in into.items():
            readers[name].read(*place, array)
    except IntegrityError:
        if rows > LEAST_ROWS:
            middle, (batch, head, first) = rows // 2, place
            below = _read(readers, place, {name: array[:middle] for name, array in into.items()})
            above = {name: array[middle:] for name, array in into.items()}
            return np.concatenate([below, _read(readers, (batch, head, first + middle), above)])
        for array in into.values():
            array[...] = np.nan
        return np.zeros(rows, bool)
    return np.ones(rows, bool)
