"""Rows of a result in float64, with K and V streamed.

Nothing of a run is reused here: no kernel, no merge, no division; the formula of attention alone, in numpy.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from operator import itemgetter

import numpy as np

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.rows import RowReader
from oocattn.threads import ThreadPool, map_in_order
from oocattn.verification.chunk_cache import ChunkCache
from oocattn.verification.findings import RowCheck
from oocattn.verification.groups import RowGroup, SharedKeys, TileMemory, rows_that_share_keys
from oocattn.verification.repeats import slots_for
from oocattn.verification.rounding import CHANCE, LARGEST, SMALLEST, UNIT_ROUNDOFF, least_length, subnormal_rounding
from oocattn.verification.sampling import SampledRow, sample_rows
from oocattn.verification.softmax import BUFFERS, Array64, Sums, Tile, TileSums, most_borders

KEY_ROWS = 8192
"""Keys that are read and attended at a time by many rows: what they fill stays in the processor's caches."""

MORE_KEYS = 16  # times KEY_ROWS are attended at a time by few rows of few dimensions, at most
TILE_NUMBERS = 7 << 20
"""Numbers of a tile, at most, where it has more keys: with fewer, Python's lock, which calls need, is what binds."""

GROUP_ROWS = 256
"""Rows of one head group that are recomputed together, at most; for more of them K and V are read again."""

AHEAD = 2  # tiles that are begun for each thread, so that none waits for the next


@dataclass(frozen=True)
class Tiles:
    """How many keys are attended at a time, by how many rows together, at most, and in how many threads that is done.

    `chunks` are those that are kept once they are decoded.
    """

    keys: int
    rows: int
    threads: int
    chunks: int = 0


@dataclass(frozen=True)
class ExactRow(SampledRow):
    """A row in float64: out [Dv] and lse.

    `size` is the sum of weight times |value|, `chance` that of `Sums`; `allowed` and `allowed_lse` are what float32 may lose
    of out (norm) and lse.
    """

    out: Array64
    lse: float
    size: float
    chance: float
    allowed: float
    allowed_lse: float


def compare_row(problem: Problem, exact: ExactRow, out: Array64, lse: float) -> RowCheck:
    """The check of one row, found as `out` [Dv] and `lse`.

    Errors of `out` are relative to the norm of the exact row, or where that is small by chance, and weights are rounded, to
    what it would be by chance, ten times the row's own at most. Where it is nearly nothing, because values cancel or are
    nearly subnormal in the dtype of `out`, they are relative to a thousandth of the values' size or to 200 such roundings.
    """
    of_rows = problem.out_dtype, problem.value_dim
    tiny, norm = subnormal_rounding(*of_rows), _norm(np.where(np.isfinite(exact.out), exact.out, 0.0))
    length = max(norm, min(CHANCE * norm, exact.chance), exact.size / 1000, least_length(*of_rows))
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


def most_key_rows(problem: Problem, rows: int) -> int:
    """Keys that so many rows attend at a time, at most: a power of two times KEY_ROWS."""
    of_key = problem.head_dim + problem.value_dim + BUFFERS * rows
    times = min(MORE_KEYS, max(1, TILE_NUMBERS // (KEY_ROWS * of_key)))
    return KEY_ROWS << (times.bit_length() - 1)


def recompute_bytes(problem: Problem, dataset: Dataset, rows: int, key_rows: int, threads: int = 1) -> int:
    """Host memory, in bytes, to recompute `rows` rows by tiles of keys in so many threads."""
    members, dims = min(rows, GROUP_ROWS), problem.head_dim + problem.value_dim
    biases = 12 * min(problem.bias_heads, members)  # as read, and in float64
    # float64, as read, masks, what is made of NaN and Inf; order and positions
    tile = dims * (8 + problem.itemsize + 2 + 3 * 8) + 10 * 8 + biases
    terms = 0 if problem.is_plain else 2 * 8  # terms, and their rounding
    weights = members * (5 * 8 + 2 * 8 + 5 + terms)  # scores, weights and what errors they have; temporaries; masks
    work = members * 8 * (4 * problem.head_dim + 16 * problem.value_dim + 40)  # what is added; queries' sizes; exact rows
    decoding = max(array.decode_bytes for array in dataset.arrays.values())
    key_rows = min(key_rows, problem.keys)
    of_thread = key_rows * (tile + weights) + work + decoding
    # Tiles in flight: the sums of each and of its group. Counts of repeated keys are few in a group that begins and ends
    # among them: but two groups go on beyond them.
    flying = 2 if threads == 1 else AHEAD * threads + 2
    sums = members * 8 * (14 * problem.value_dim + 3 * problem.head_dim + 60)
    partial = most_borders(key_rows) * members * 8 * (problem.value_dim + 2)
    return threads * of_thread + flying * (sums + partial + 8 * slots_for(key_rows)) + 2 * 4 * slots_for(problem.keys)


def recompute_rows(
    problem: Problem,
    dataset: Dataset,
    *,
    borders: Sequence[int],
    rows: int,
    seed: int,
    key_rows: int = KEY_ROWS,
    threads: int = 1,
    chunks: int = 0,
    weight_roundoff: float = UNIT_ROUNDOFF["float32"],
) -> Iterator[ExactRow]:
    """Recompute the rows of `sample_rows`, as `recompute_places`."""
    places = sample_rows(problem, borders, rows, seed)
    return recompute_places(problem, dataset, places, Tiles(key_rows, GROUP_ROWS, threads, chunks), weight_roundoff)


def recompute_places(
    problem: Problem, dataset: Dataset, places: Iterable[SampledRow], tiles: Tiles, weight_roundoff: float
) -> Iterator[ExactRow]:
    """Recompute rows in float64, those that share keys together. Threads take tiles of keys of all of them, one by one.

    What is found does not depend on the threads: each tile is summed by itself, and sums are added in their order. What is
    allowed counts softmax weights as rounded to `weight_roundoff`.
    """
    groups = list(rows_that_share_keys(problem, places, tiles.rows))
    members = max((len(shared.places) for shared in groups), default=0)
    keys = min(tiles.keys, max((shared.attended.keys for shared in groups), default=0))
    cache, of_thread = ChunkCache(dataset.arrays, tiles.keys, tiles.chunks), threading.local()

    def sum_tile(group: RowGroup, tile: Tile | None) -> tuple[RowGroup, TileSums | None]:
        if not hasattr(of_thread, "memory"):
            of_thread.memory = TileMemory(problem, members, keys)
        return group, None if tile is None else group.sum_tile(tile, of_thread.memory)

    def calls() -> Iterator[tuple[RowGroup, Tile | None]]:
        for shared in groups:
            group = RowGroup(problem, dataset, cache, shared, weight_roundoff)
            if not shared.attended.keys:
                yield group, None
            yield from ((group, tile) for tile in group.tiles(tiles.keys))

    with ThreadPool(tiles.threads, "oocattn-recompute") as pool:
        summed: Iterator[tuple[RowGroup, TileSums | None]] = itertools.starmap(sum_tile, calls())
        if tiles.threads > 1:  # alone, a thread of the pool and this one would take turns
            summed = map_in_order(pool, sum_tile, calls(), AHEAD * tiles.threads)
        for group, found in itertools.groupby(summed, itemgetter(0)):
            softmax = group.softmax()
            with np.errstate(all="ignore"):
                for _, sums in found:
                    if sums is not None:
                        softmax.merge(sums)
                exact = softmax.sums()
            yield from _rows(group.shared, exact)


def _rows(shared: SharedKeys, found: Sums) -> Iterator[ExactRow]:
    columns = (found.lse, found.size, found.chance, found.allowed, found.allowed_lse)
    for place, out, *of_row in zip(shared.places, found.out, *columns, strict=True):
        yield ExactRow(place.batch, place.head, place.token, place.strata, out, *map(float, of_row))


def _difference(found: Array64, expected: Array64) -> Array64:
    """|found - expected|. 0 where both are the same NaN or Inf, Inf where only one is not finite."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    finite = np.isfinite(found) & np.isfinite(expected)
    return np.where(same, 0.0, np.where(finite, np.abs(found - np.where(same, 0.0, expected)), np.inf))


def _norm(numbers: Array64) -> float:
    return float(np.sqrt(np.sum(numbers * numbers)))
