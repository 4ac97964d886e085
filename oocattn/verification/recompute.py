"""Rows of a result in float64, with K and V streamed.

Nothing of a run is reused here: no kernel, no merge, no division; the formula of attention alone, in numpy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from operator import attrgetter
from typing import Literal

import numpy as np

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.rows import RowReader
from oocattn.threads import ThreadPool, map_in_order
from oocattn.verification.attended import AttendedKeys, Int64s, attended_ranges, groups_of, key_positions
from oocattn.verification.findings import RowCheck
from oocattn.verification.repeats import slots_for
from oocattn.verification.rounding import LARGEST, SMALLEST, UNIT_ROUNDOFF
from oocattn.verification.sampling import SampledRow, sample_rows
from oocattn.verification.softmax import Array64, Rows, Softmax

KEY_ROWS = 8192
"""Keys that are read and attended at a time, at most."""

GROUP_ROWS = 256
"""Rows of one head group that are recomputed together, at most; for more of them K and V are read again."""


@dataclass(frozen=True)
class Tiles:
    """How many keys are attended at a time, by how many rows together, at most, and in how many threads that is done."""

    keys: int
    rows: int
    threads: int


@dataclass(frozen=True)
class ExactRow(SampledRow):
    """A row in float64: out [Dv] and lse.

    `size` is the sum of weight times |value|; `allowed` and `allowed_lse` are what float32 may lose of out (norm) and lse.
    """

    out: Array64
    lse: float
    size: float
    allowed: float
    allowed_lse: float


def compare_row(problem: Problem, exact: ExactRow, out: Array64, lse: float) -> RowCheck:
    """The check of one row, found as `out` [Dv] and `lse`.

    Errors of `out` are relative to the norm of the exact row; where that is nearly nothing, because values cancel or
    are nearly subnormal in the dtype of `out`, to a thousandth of the values' size or to 200 such roundings.
    """
    tiny = SMALLEST[problem.out_dtype] / 2 * math.sqrt(problem.value_dim)
    norm = _norm(np.where(np.isfinite(exact.out), exact.out, 0.0))
    length = max(norm, exact.size / 1000, 200 * tiny)
    allowed = UNIT_ROUNDOFF[problem.out_dtype] * norm + tiny + exact.allowed
    of_lse = np.asarray([lse]), np.asarray([exact.lse])
    with np.errstate(all="ignore"):
        ulps = error_in_ulps(out, exact.out, problem.out_dtype)
        lse_ulps = error_in_ulps(*of_lse, "float32")
        overflow = (np.abs(exact.out) + allowed > LARGEST[problem.out_dtype]) & (out == np.copysign(np.inf, exact.out))
        error = _norm(np.where(overflow, 0.0, _difference(out, exact.out)))
        lse_error = _norm(_difference(*of_lse))
    place = (exact.batch, exact.head, exact.token, exact.strata)
    return RowCheck(
        *place,
        length=length,
        error=error / length,
        allowed=allowed / length,
        lse_error=lse_error,
        allowed_lse=exact.allowed_lse,
        ulps=float(ulps.max()),
        mean_ulps=float(ulps.mean()),
        lse_ulps=float(lse_ulps[0]),
    )


def check_row(problem: Problem, exact: ExactRow, readers: Mapping[str, RowReader]) -> RowCheck:
    """The check of a row as it is stored; one that cannot be read is wrong, whatever it should be."""
    found = {name: np.empty((1, *reader.shape[3:]), reader.dtype) for name, reader in readers.items()}
    try:
        for name, reader in readers.items():
            reader.read(exact.batch, exact.head, exact.token, found[name])
    except IntegrityError:
        as_if = compare_row(problem, exact, exact.out, exact.lse)
        return replace(as_if, error=nan, lse_error=nan, ulps=inf, mean_ulps=inf, lse_ulps=inf)
    return compare_row(problem, exact, found["out"][0].astype(np.float64), float(found["lse"][0]))


def error_in_ulps(found: Array64, exact: Array64, dtype: str) -> Array64:
    """|found - exact| in units of the last place of `exact` in `dtype`.

    At most 0.5 where it is rounded right; 0 where both are NaN or the same Inf, after rounding; Inf where only one is.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = exact.astype(numpy_dtype(dtype)).astype(np.float64)
        _, exponent = np.frexp(rounded)  # rounded = m * 2^exponent with 0.5 <= m < 1
        unit = np.where(rounded == 0, 0.0, np.ldexp(2 * UNIT_ROUNDOFF[dtype], exponent - 1))
        ulps = np.abs(found - exact) / np.maximum(unit, SMALLEST[dtype])
    special = ~(np.isfinite(found) & np.isfinite(rounded))
    same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
    return np.where(special, np.where(same, 0.0, np.inf), ulps)


def recompute_bytes(problem: Problem, dataset: Dataset, rows: int, key_rows: int) -> int:
    """Host memory, in bytes, to recompute `rows` rows by tiles of keys."""
    members, dims = min(rows, GROUP_ROWS), problem.head_dim + problem.value_dim
    biases = 12 * min(problem.bias_heads, members)  # as read, and in float64
    tile = (
        dims * (8 + problem.itemsize + 2 + 3 * 8) + 10 * 8 + biases
    )  # float64, as read, masks; hashes; order and positions
    terms = 0 if problem.is_plain else 2 * 8  # terms, and their rounding
    weights = members * (5 * 8 + 2 * 8 + 5 + terms)  # scores, weights and what errors they have; temporaries; masks
    state = members * 8 * (8 * problem.head_dim + 16 * problem.value_dim + 40)  # query, sums, what is added; exact rows
    repeats = 4 * slots_for(problem.keys)
    decoding = max(array.decode_bytes for array in dataset.arrays.values())
    return min(key_rows, problem.keys) * (tile + weights) + state + repeats + decoding


def recompute_rows(
    problem: Problem,
    dataset: Dataset,
    *,
    borders: Sequence[int],
    rows: int,
    seed: int,
    key_rows: int = KEY_ROWS,
    threads: int = 1,
    weight_roundoff: float = UNIT_ROUNDOFF["float32"],
) -> Iterator[ExactRow]:
    """Recompute the rows of `sample_rows`, as `recompute_places`."""
    places = sample_rows(problem, borders, rows, seed)
    return recompute_places(problem, dataset, places, Tiles(key_rows, GROUP_ROWS, threads), weight_roundoff)


def recompute_places(
    problem: Problem, dataset: Dataset, places: Iterable[SampledRow], tiles: Tiles, weight_roundoff: float
) -> Iterator[ExactRow]:
    """Recompute rows in float64; those that share keys together, others in other threads.

    What is allowed counts softmax weights as rounded to `weight_roundoff`.
    """

    def recompute(batch: int, kv_head: int, members: list[SampledRow], ranges: Int64s) -> list[ExactRow]:
        read = _Reader(problem, dataset, batch, kv_head, min(tiles.keys, problem.keys))
        return list(_recompute(problem, read, members, AttendedKeys(ranges), weight_roundoff))

    with ThreadPool(tiles.threads, "oocattn-recompute") as pool:
        for found in map_in_order(pool, recompute, _together(problem, places, tiles.rows), tiles.threads):
            yield from found


def _together(
    problem: Problem, places: Iterable[SampledRow], most: int
) -> Iterator[tuple[int, int, list[SampledRow], Int64s]]:
    """Rows that are recomputed together, at most so many: batch entry, head of keys, rows, and the ranges of their keys."""
    groups = defaultdict(list)
    for place in places:
        groups[place.batch, query_head(problem, place) // (problem.query_heads // problem.kv_heads)].append(place)
    for (batch, kv_head), members in groups.items():
        members.sort(key=attrgetter("token", "head"))
        ranges = attended_ranges(problem, batch, query_tokens(problem, members))
        for part in groups_of(ranges, most):
            yield batch, kv_head, members[part], ranges[part]


def query_head(problem: Problem, place: SampledRow) -> int:
    """The query head of a row of `out`."""
    return place.head if problem.heads is None else problem.heads[place.head]


def query_tokens(problem: Problem, places: Sequence[SampledRow]) -> Int64s:
    """The rows of q that rows of `out` are computed from: int64 [rows]."""
    return problem.rows_asked[0] + np.asarray([place.token for place in places])


def _difference(found: Array64, expected: Array64) -> Array64:
    """|found - expected|. 0 where both are the same NaN or Inf, Inf where only one is not finite."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    finite = np.isfinite(found) & np.isfinite(expected)
    return np.where(same, 0.0, np.where(finite, np.abs(found - np.where(same, 0.0, expected)), np.inf))


def _norm(numbers: Array64) -> float:
    return float(np.sqrt(np.sum(numbers * numbers)))


class _Reader:
    """Reads rows of one head group, in float64, into buffers that are used again."""

    def __init__(self, problem: Problem, dataset: Dataset, batch: int, kv_head: int, key_rows: int) -> None:
        self._problem, self._arrays = problem, dataset.arrays
        self.batch, self._kv_head, self.key_rows = batch, kv_head, key_rows
        dtype, dims = numpy_dtype(problem.dtype), {"k": problem.head_dim, "v": problem.value_dim}
        self._raw = {name: np.empty((key_rows, dim), dtype) for name, dim in dims.items()}
        self._tiles = {name: np.empty((key_rows, dim)) for name, dim in dims.items()}
        self._bias = np.empty(key_rows if problem.bias_heads else 0, np.float32)

    def query(self, places: Sequence[SampledRow]) -> Array64:
        """The queries of rows of `out`: [rows, D]."""
        raw, found = self._raw["k"][:1], np.empty((len(places), self._problem.head_dim))
        for index, (place, token) in enumerate(zip(places, query_tokens(self._problem, places).tolist(), strict=True)):
            self._arrays["q"].read_rows(self.batch, query_head(self._problem, place), token, token + 1, raw)
            found[index] = raw[0]
        return found

    def keys(self, name: Literal["k", "v"], start: int, stop: int) -> Array64:
        """Keys or values [n, D or Dv], until they are read again."""
        raw, tile = self._raw[name][: stop - start], self._tiles[name][: stop - start]
        self._arrays[name].read_rows(self.batch, self._kv_head, start, stop, raw)
        np.copyto(tile, raw)
        return tile

    def bias(self, heads: Sequence[int], start: int, stop: int) -> Array64 | None:
        """The key bias of rows of these query heads: [rows or 1, n]; None where there is none."""
        if not self._problem.bias_heads:
            return None
        shared = self._problem.bias_heads == 1
        of_heads, raw = {}, self._bias[: stop - start]
        for head in [0] if shared else sorted(set(heads)):
            self._arrays["key_bias"].read_rows(self.batch, head, start, stop, raw)
            of_heads[head] = raw.astype(np.float64)
        return np.stack([of_heads[head] for head in ([0] if shared else heads)])


def _recompute(
    problem: Problem, read: _Reader, places: Sequence[SampledRow], attended: AttendedKeys, weight_roundoff: float
) -> Iterator[ExactRow]:
    """Each of these rows of one head group in float64."""
    heads = [query_head(problem, place) for place in places]
    positions = key_positions(problem, read.batch, query_tokens(problem, places))
    slopes, sinks = problem.given.alibi_slopes, problem.given.learnable_sink
    of_entry = slopes if slopes is None or slopes.ndim == 1 else slopes[read.batch]
    of_heads = (None if array is None else array[heads].astype(np.float64) for array in (of_entry, sinks))
    softmax = Softmax(problem, Rows(read.query(places), positions, *of_heads), attended, read.key_rows, weight_roundoff)
    with np.errstate(all="ignore"):  # NaN and Inf flow as they come, and what underflows is nothing
        for start, stop in attended.tiles(read.key_rows):
            softmax.weigh(read.keys("k", start, stop), start, read.bias(heads, start, stop))
            softmax.add(read.keys("v", start, stop), start)
        found = softmax.sums()
    columns = (found.lse, found.size, found.allowed, found.allowed_lse)
    for place, out, *of_row in zip(places, found.out, *columns, strict=True):
        yield ExactRow(place.batch, place.head, place.token, place.strata, out, *map(float, of_row))
