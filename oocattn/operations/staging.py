"""The rows that a subproblem stages: of each chunk those that a live pair needs. Pure integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from oocattn.division.base import Subproblem
from oocattn.division.live import LivePairs
from oocattn.planning.live import is_square
from oocattn.planning.plan import Plan
from oocattn.problem.bounds import join_ranges
from oocattn.problem.mask import Mask

MOST_KEPT_DOCUMENTS = 4096
"""Of a mask whose staged rows and tiles are kept for its next head group: both take 300 bytes for each document."""


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a chunk that are staged, one after another.

    `place` are the rows of the staged tensors that hold them: of queries counted within the chunk, of keys over all chunks.
    Where `counted_for` is a query chunk, NaN and Inf of these rows are counted with its partial: once in the whole run.
    """

    rows: range
    place: range
    counted_for: int | None = None

    def part(self, rows: range) -> Run:
        """Some of the rows, which are of this run."""
        start = self.place.start + rows.start - self.rows.start
        return Run(rows, range(start, start + len(rows)), self.counted_for)


@dataclass(frozen=True, eq=False)
class StagedRows:
    """The staged rows of a subproblem, by chunk: ascending runs. `key_total` is the number of keys.

    Head groups of one mask may share it.
    """

    queries: dict[int, list[Run]]
    keys: dict[int, list[Run]]
    key_total: int


def stage_rows(plan: Plan, head_group: int, subproblem: Subproblem) -> StagedRows:
    """What a subproblem of a head group stages."""
    return _Staging(plan, head_group, subproblem).rows()


class _Staging:
    """The chunks of one subproblem, and what of them is needed and counted."""

    def __init__(self, plan: Plan, head_group: int, subproblem: Subproblem) -> None:
        self._plan, self._subproblem = plan, subproblem
        self._mask: Mask = plan.mask(head_group)
        self._live: LivePairs = plan.division_of(head_group).live
        # Then every row of a chunk is needed by each live pair.
        triangular = self._mask.is_triangular and is_square(self._mask, plan.grid) and self._live.is_triangular
        self._whole = self._mask.is_full or triangular

    def rows(self) -> StagedRows:
        queries: dict[int, list[Run]] = {}
        keys: dict[int, list[Run]] = {}
        total = 0
        for block in self._subproblem.blocks:
            chunk, first = block.query_chunk, self._query_rows(block.query_chunk).start
            counted = [(chunk, part) for key in block.key_chunks for part in self._new_rows(chunk, key)]
            queries[chunk] = [
                Run(rows, range(rows.start - first, rows.stop - first), counted_for)
                for rows, counted_for in _cut(self._live_rows(chunk, block.key_chunks), counted)
            ]
        for key in self._subproblem.key_chunks:
            attending = [block.query_chunk for block in self._subproblem.blocks if key in block.key_chunks]
            counted = [(chunk, part) for chunk in attending for part in self._new_keys(chunk, key)]
            keys[key] = []
            for rows, counted_for in _cut(self._live_keys(attending, key), counted):
                keys[key].append(Run(rows, range(total, total + len(rows)), counted_for))
                total += len(rows)
        return StagedRows(queries, keys, total)

    def _query_rows(self, chunk: int) -> range:
        return self._plan.query_rows(chunk)

    def _key_rows(self, chunk: int) -> range:
        return self._plan.grid.keys(chunk, self._mask.keys)

    def _live_rows(self, chunk: int, keys: Iterable[int]) -> list[range]:
        """The rows of a query chunk that attend any key of some chunks."""
        rows = self._query_rows(chunk)
        return [rows] if self._whole else self._mask.live_rows(rows, map(self._key_rows, keys))

    def _live_keys(self, chunks: Iterable[int], key: int) -> list[range]:
        """The keys of a chunk that any row of some query chunks attends."""
        keys = self._key_rows(key)
        if self._whole:
            return [keys]
        return join_ranges([part for chunk in chunks for part in self._mask.live_keys(self._query_rows(chunk), keys)])

    def _new_rows(self, chunk: int, key: int) -> list[range]:
        """The rows of a query chunk whose first key is in a key chunk: they are counted with this pair."""
        rows, keys = self._query_rows(chunk), self._key_rows(key)
        if self._whole:
            return [rows] if key == 0 else []
        return _less(self._mask.live_rows(rows, [keys]), self._mask.live_rows(rows, [range(keys.start)]))

    def _new_keys(self, chunk: int, key: int) -> list[range]:
        """The keys of a chunk that no row before a query chunk attends, but one in it: they are counted with this pair."""
        rows, keys = self._query_rows(chunk), self._key_rows(key)
        if self._whole:
            return [keys] if chunk == (0 if self._mask.is_full else key) else []
        before = range(self._plan.grid.start, rows.start)
        return _less(self._mask.live_keys(rows, keys), self._mask.live_keys(before, keys))


def _less(parts: list[range], others: list[range]) -> list[range]:
    """What ascending ranges have that other ascending ones have not."""
    return [part for part, counted_for in _cut(parts, [(0, other) for other in others]) if counted_for is None]


def _cut(parts: list[range], counted: list[tuple[int, range]]) -> Iterator[tuple[range, int | None]]:
    """Cut ascending ranges at the ends of those that are counted, each for a chunk, which do not overlap."""
    counted = sorted(counted, key=lambda each: each[1].start)
    first = 0  # of those that end after what was cut so far
    for part in parts:
        start = part.start
        while first < len(counted) and counted[first][1].stop <= start:
            first += 1
        at = first
        while at < len(counted) and counted[at][1].start < part.stop:
            chunk, other = counted[at]
            if start < other.start:
                yield range(start, other.start), None
            begin = max(other.start, start)
            start = min(other.stop, part.stop)
            yield range(begin, start), chunk
            at += 1
        if start < part.stop:
            yield range(start, part.stop), None
