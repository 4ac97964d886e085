"""Rows of one head group that share keys: what is read for them, and their sums over each tile of keys.

Any thread may do that with any tile. Each has memory of its own, which it uses again.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.threads import InOrder
from oocattn.verification.attended import AttendedKeys, Int64s, attended_ranges, groups_of, key_positions
from oocattn.verification.chunk_cache import ChunkCache
from oocattn.verification.repeats import Repeats
from oocattn.verification.sampling import SampledRow
from oocattn.verification.softmax import BUFFERS, Array64, Rows, Softmax, Tile, TileSoftmax, TileSums


@dataclass(frozen=True)
class SharedKeys:
    """Rows of `out` of one head of keys, and the keys that any of them attends."""

    batch: int
    kv_head: int
    places: Sequence[SampledRow]
    attended: AttendedKeys


class TileMemory:
    """Memory of a thread for a tile of at most so many keys, of at most so many rows."""

    def __init__(self, problem: Problem, rows: int, keys: int) -> None:
        dims = problem.head_dim, problem.value_dim
        self._raw = np.empty(keys * max(dims), numpy_dtype(problem.dtype))
        self._tiles = dict(zip("kv", (np.empty((keys, dim)) for dim in dims), strict=True))
        self._bias = np.empty(keys if problem.bias_heads else 0, np.float32)
        self.buffers = [np.empty(rows * keys) for _ in range(BUFFERS)]  # apart: not at the same places of a cache

    def raw(self, keys: int, dim: int) -> npt.NDArray[Any]:
        """For numbers as they are read: [keys, dim]."""
        return self._raw[: keys * dim].reshape(keys, dim)

    def tile(self, name: Literal["k", "v"], keys: int) -> Array64:
        """For keys [keys, D] or values [keys, Dv] in float64."""
        return self._tiles[name][:keys]

    def bias(self, keys: int) -> npt.NDArray[np.float32]:
        """For a bias of keys, as it is read."""
        return self._bias[:keys]


class RowGroup:
    """Rows that share keys, in float64. What it holds for all of its tiles, it holds from the first one on."""

    def __init__(
        self, problem: Problem, dataset: Dataset, keys: ChunkCache, shared: SharedKeys, weight_roundoff: float
    ) -> None:
        self._problem, self._arrays, self._keys, self._weight_roundoff = problem, dataset.arrays, keys, weight_roundoff
        self.shared = shared
        self._heads = [query_head(problem, place) for place in shared.places]
        self._repeats = Repeats(shared.attended.keys, problem.head_dim * problem.itemsize)
        self._in_order = InOrder()
        self._reading = threading.Lock()
        self._rows: Rows | None = None

    def tiles(self, keys: int) -> Iterator[Tile]:
        """The tiles of its keys, of at most so many."""
        return Tile.all_of(self.shared.attended, keys)

    def sum_tile(self, tile: Tile, memory: TileMemory) -> TileSums:
        """The sums over a tile. Calls may run in several threads, but begin in the order of the tiles."""
        try:
            key = self._read("k", tile, memory)
            equal = self._repeats.sort(memory.raw(*key.shape))
        except BaseException:
            with self._in_order.turn(tile.number):  # those after it would wait without end
                raise
        with self._in_order.turn(tile.number):
            before = self._repeats.count(equal)
        rows, attended, roundoff = self.rows, self.shared.attended, self._weight_roundoff
        with np.errstate(all="ignore"):  # NaN and Inf flow as they come, and what underflows is nothing
            softmax = TileSoftmax(self._problem, rows, attended, tile, roundoff, memory.buffers)
            softmax.weigh(key, equal.occurrences(before), self._read_bias(tile, memory))
            del equal
            return softmax.add(self._read("v", tile, memory))

    @property
    def rows(self) -> Rows:
        """Its query rows, which are read once."""
        with self._reading:
            if self._rows is None:
                self._rows = self._read_rows()
            return self._rows

    def softmax(self) -> Softmax:
        """The sums over all keys, to which those of tiles are to be added in their order."""
        return Softmax(self._problem, self.rows, self.shared.attended, self._weight_roundoff)

    def _read_rows(self) -> Rows:
        problem, shared = self._problem, self.shared
        tokens = query_tokens(problem, shared.places)
        query, raw = np.empty((len(tokens), problem.head_dim)), np.empty((1, problem.head_dim), numpy_dtype(problem.dtype))
        for index, (head, token) in enumerate(zip(self._heads, tokens.tolist(), strict=True)):
            self._arrays["q"].read_rows(shared.batch, head, token, token + 1, raw)
            query[index] = raw[0]
        slopes, sinks = problem.given.alibi_slopes, problem.given.learnable_sink
        of_entry = slopes if slopes is None or slopes.ndim == 1 else slopes[shared.batch]
        of_heads = (None if array is None else array[self._heads].astype(np.float64) for array in (of_entry, sinks))
        return Rows(query, key_positions(problem, shared.batch, tokens), *of_heads)

    def _read(self, name: Literal["k", "v"], tile: Tile, memory: TileMemory) -> Array64:
        """Keys or values [n, D or Dv] of a tile, until the memory is used again."""
        found = memory.tile(name, tile.stop - tile.start)
        raw = memory.raw(*found.shape)
        self._keys.read(name, self.shared.batch, self.shared.kv_head, range(tile.start, tile.stop), raw)
        np.copyto(found, raw)
        return found

    def _read_bias(self, tile: Tile, memory: TileMemory) -> Array64 | None:
        """The key bias of the rows: [rows or 1, n]; None where there is none."""
        if not self._problem.bias_heads:
            return None
        shared = self._problem.bias_heads == 1
        of_heads, raw = {}, memory.bias(tile.stop - tile.start)
        for head in [0] if shared else sorted(set(self._heads)):
            self._arrays["key_bias"].read_rows(self.shared.batch, head, tile.start, tile.stop, raw)
            of_heads[head] = raw.astype(np.float64)
        return np.stack([of_heads[head] for head in ([0] if shared else self._heads)])


def rows_that_share_keys(problem: Problem, places: Iterable[SampledRow], most: int) -> Iterator[SharedKeys]:
    """Rows that are recomputed together, at most so many."""
    groups = defaultdict(list)
    for place in places:
        groups[place.batch, query_head(problem, place) // (problem.query_heads // problem.kv_heads)].append(place)
    for (batch, kv_head), members in groups.items():
        members.sort(key=attrgetter("token", "head"))
        ranges = attended_ranges(problem, batch, query_tokens(problem, members))
        for part in groups_of(ranges, most):
            yield SharedKeys(batch, kv_head, members[part], AttendedKeys(ranges[part]))


def query_head(problem: Problem, place: SampledRow) -> int:
    """The query head of a row of `out`."""
    return place.head if problem.heads is None else problem.heads[place.head]


def query_tokens(problem: Problem, places: Sequence[SampledRow]) -> Int64s:
    """The rows of q that rows of `out` are computed from: int64 [rows]."""
    return problem.rows_asked[0] + np.asarray([place.token for place in places])
