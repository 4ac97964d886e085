"""The live chunk pairs of a mask, and the keys that chunks and tiles of rows need. Pure arithmetic over masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from oocattn.division.live import LivePairs
from oocattn.division.quorums import CyclicQuorums
from oocattn.problem.bounds import merge_ranges
from oocattn.problem.mask import Mask
from oocattn.units import ceil_div

MOST_PRUNED = 1024
"""Chunks up to which each pair is looked at; of full and triangular masks, of which few pairs are dead, also for more."""

P = ParamSpec("P")
R = TypeVar("R")


def kept_with_mask(function: Callable[Concatenate[Mask, P], R]) -> Callable[Concatenate[Mask, P], R]:
    """Have what a function finds of a mask kept as long as the mask, whose documents may take megabytes.

    The other arguments are passed by position.
    """
    kept: WeakKeyDictionary[Mask, dict[tuple[object, ...], R]] = WeakKeyDictionary()

    @wraps(function)
    def find(mask: Mask, *arguments: P.args, **options: P.kwargs) -> R:
        found = kept.setdefault(mask, {})
        if arguments not in found:
            found.setdefault(arguments, function(mask, *arguments, **options))
        return found[arguments]

    return cast(Callable[Concatenate[Mask, P], R], find)


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of the rows from `start` up to `stop`, and of all keys: numbers and sizes of both."""

    start: int
    stop: int
    query_chunks: int
    chunk_rows: int
    key_chunks: int
    key_chunk_rows: int

    def rows(self, chunk: int) -> range:
        """The rows of a query chunk; those of the last chunks may be few or none."""
        first = min(self.start + chunk * self.chunk_rows, self.stop)
        return range(first, min(first + self.chunk_rows, self.stop))

    def keys(self, chunk: int, keys: int) -> range:
        """Those of so many keys that a key chunk has."""
        first = min(chunk * self.key_chunk_rows, keys)
        return range(first, min(first + self.key_chunk_rows, keys))


@kept_with_mask
def live_pairs(mask: Mask, grid: ChunkGrid) -> LivePairs:
    """The chunk pairs of which any row attends any key."""
    queries, keys = grid.query_chunks, grid.key_chunks
    filled = (queries - 1) * grid.chunk_rows < grid.stop - grid.start and (keys - 1) * grid.key_chunk_rows < mask.keys
    if filled or (mask.keys and max(queries, keys) > MOST_PRUNED):
        if mask.is_full:
            return LivePairs.full(queries, keys)
        if mask.is_triangular and is_square(mask, grid):
            return LivePairs.triangular(queries)
    owners, starts, stops = mask.live_keys_between(row_edges(grid, grid.chunk_rows))
    return LivePairs.of_ranges(queries, keys, owners, starts // grid.key_chunk_rows, -(-stops // grid.key_chunk_rows))


def is_square(mask: Mask, grid: ChunkGrid) -> bool:
    """True if query chunks are of all rows, and each has the rows whose keys the key chunk of its number has."""
    same = (grid.query_chunks, grid.chunk_rows) == (grid.key_chunks, grid.key_chunk_rows)
    return same and (grid.start, grid.stop) == (0, mask.queries) and mask.queries == mask.keys


def row_edges(grid: ChunkGrid, step: int) -> npt.NDArray[np.int64]:
    """The edges of pieces of `step` rows of each query chunk."""
    pieces = ceil_div(grid.chunk_rows, step)
    within = np.minimum(np.arange(pieces, dtype=np.int64) * step, grid.chunk_rows)
    edges = grid.start + (np.arange(grid.query_chunks, dtype=np.int64)[:, None] * grid.chunk_rows + within).ravel()
    ends = np.append(edges, grid.start + grid.query_chunks * grid.chunk_rows)
    return cast(npt.NDArray[np.int64], np.minimum(ends, grid.stop))


@kept_with_mask
def keys_needed(mask: Mask, grid: ChunkGrid, step: int) -> tuple[int, int]:
    """Keys that pieces of `step` rows of the query chunks attend: the sum over all pieces, and the most of one."""
    edges = row_edges(grid, step)
    if mask.is_full:
        return int((edges[1:] > edges[:-1]).sum()) * mask.keys, mask.keys
    owners, starts, stops = mask.live_keys_between(edges)
    counts = np.bincount(owners, weights=stops - starts).astype(np.int64)  # each is exact: fewer than 2^53
    return int(counts.sum()), int(counts.max(initial=0))


@kept_with_mask
def dead_gaps(mask: Mask, start: int, stop: int) -> tuple[int, int]:
    """Gaps between those of the rows from `start` to `stop` that attend any key, and between the keys that these attend."""
    _, starts, stops = mask.live_keys_between(np.array([start, stop]))
    live = len(mask.live_rows(range(start, stop), [range(mask.keys)])), len(merge_ranges(starts, stops)[0])
    return max(0, live[0] - 1), max(0, live[1] - 1)


@kept_with_mask
def shapes_of_documents(mask: Mask, rows: int) -> int:
    """Documents with rows and keys; those of one shape that begin in the same `rows` rows count as one."""
    first, queries, keys = mask.query_edges[:-1], np.diff(mask.query_edges), np.diff(mask.key_edges)
    shapes = (first // rows * 1_000_003 + queries) * 1_000_000_007 + keys  # modulo 2^64: few are the same by chance
    return len(np.unique(shapes[(queries > 0) & (keys > 0)]))


def keys_of_quorums(mask: Mask, grid: ChunkGrid, division: CyclicQuorums) -> int:
    """Keys that quorums stage, each of them those that any of its pairs needs, without the pairs one by one."""
    if mask.is_full or (mask.is_triangular and is_square(mask, grid)):  # then every key of a chunk is needed, or none
        return division.keys_read([len(grid.keys(chunk, mask.keys)) for chunk in range(grid.key_chunks)])
    owners, starts, stops = mask.live_keys_between(row_edges(grid, grid.chunk_rows))
    first, rows = starts // grid.key_chunk_rows, grid.key_chunk_rows
    chunks = (stops - 1) // rows - first + 1  # that each range of keys has a part in
    of = np.repeat(np.arange(len(starts)), chunks)
    chunk = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    apart = division.owners(owners[of], chunk) * (mask.keys + 1)  # so the keys of two quorums never touch
    low, high = np.maximum(starts[of], chunk * rows), np.minimum(stops[of], (chunk + 1) * rows)
    begin, end = merge_ranges(apart + low, apart + high)
    return int((end - begin).sum())
