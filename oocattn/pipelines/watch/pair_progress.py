"""Which chunk pairs of a run are done, in flight or left: of one head group as a matrix of few cells, of all as a strip."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.division.base import Division
from oocattn.division.live import LivePairs
from oocattn.pipelines.schedule import NOTHING_COMPLETED, CompletedWork, Schedule
from oocattn.planning.plan import Plan

MOST_CELLS = 64  # of a side of the matrix, and of the strip
ABSORBING_SECONDS = 0.005  # for which a matrix of joined chunks counts: a subproblem of 10,000 chunks takes 0.3 ms

Counts = npt.NDArray[np.int64]


class PairProgress:
    """The subproblems of a plan that are done or in flight, and the chunk pairs that these own.

    In flight is what was read into host memory and is not computed yet.
    """

    def __init__(self, plan: Plan, done: CompletedWork = NOTHING_COMPLETED) -> None:
        self._plan = plan
        self._schedule = Schedule(plan, 1, done)
        self._attended: defaultdict[int, list[int]] = defaultdict(list)
        self._in_flight: defaultdict[int, set[int]] = defaultdict(set)
        self._finished: set[int] = set()
        self._totals: dict[int, int] = {}  # subproblems of a head group, by batch entry
        self._shown = -1  # the head group whose cells are kept, and how many of its subproblems are in them
        self._absorbed = 0
        self._before: list[int] = []  # subproblems with partials of earlier processes that are not in the cells yet
        self._there: dict[int, list[int]] = {}  # the query chunks of these partials, by subproblem
        self._written = np.zeros(0, bool)  # which query chunks an earlier process wrote
        self._live = self._cells = np.zeros((0, 0), np.int64)
        self._live_of: LivePairs | None = None

    def stage(self, head_group: int, index: int) -> None:
        """A subproblem was read into memory."""
        self._in_flight[head_group].add(index)

    def attend(self, head_group: int, index: int) -> None:
        """A subproblem was computed."""
        self._in_flight[head_group].discard(index)
        self._attended[head_group].append(index)

    @property
    def current(self) -> int:
        """The first head group that was begun and is not finished; else the last that was."""
        begun = self._attended.keys() | self._in_flight.keys()
        self._finished.update(group for group in begun - self._finished if self._done(group) >= self._total(group))
        working = begun - self._finished
        return min(working) if working else max(begun, default=0)

    def strip(self) -> list[float]:
        """The share of subproblems that is done, of each head group, or of neighbours together where there are many."""
        groups, totals = self._plan.problem.head_groups, self._cell_totals
        counts = np.zeros(len(totals))
        for group in self._attended.keys() | self._schedule.completed.keys():
            counts[group * len(totals) // groups] += self._done(group)
        return [round(float(share), 4) for share in counts / np.maximum(1, totals)]

    @cached_property
    def _cell_totals(self) -> npt.NDArray[np.float64]:
        """Subproblems of the head groups in each cell of the strip; there may be more head groups than can be walked."""
        problem = self._plan.problem
        groups, cells = problem.head_groups, min(problem.head_groups, MOST_CELLS)
        edges = np.array([-(-cell * groups // cells) for cell in range(cells + 1)])
        if len(self._plan.divisions) == 1:
            return np.diff(edges) * float(self._total(0))
        totals, size = np.zeros(cells), problem.entry_groups
        for first in range(0, groups, size):
            totals += np.diff(np.clip(edges, first, first + size)) * float(self._total(first))
        return totals

    def matrix(self) -> dict[str, Any]:
        """Chunk pairs of the current head group by cell, as rows of query chunks and columns of key chunks."""
        group = self.current
        if group != self._shown:
            self._show(group)
        if self._done(group) >= self._total(group):
            self._cells = self._live.copy()
        else:
            self._absorb(group)
        flying = np.zeros_like(self._cells)
        for index in self._in_flight.get(group, ()):
            self._add_left(flying, group, index)
        return {
            "head_group": group,
            "query_chunks": self._plan.query_chunks,
            "key_chunks": self._plan.chunks,
            "live": self._live.tolist(),
            "done": self._cells.tolist(),
            "in_flight": flying.tolist(),
        }

    def _show(self, group: int) -> None:
        """Begin with the cells of a head group: what was done before this process."""
        live, done = self._division(group).live, self._schedule.done
        if self._live_of is not live:
            self._live, self._live_of = live_cells(live), live
        self._shown, self._absorbed = group, 0
        self._written = np.zeros(live.query_chunks, bool)
        self._written[[chunk for of, chunk in done.chunks if of == group]] = True
        self._cells = live_cells(live, self._written)
        self._there = defaultdict[int, list[int]](list)
        for of, chunk, index in done.partials:
            if of == group and not self._written[chunk]:
                self._there[index].append(chunk)
        self._before = list(self._there)

    def _absorb(self, group: int) -> None:
        """Count what was computed since the last time; of thousands of chunks, the rest the next time."""
        is_exact = max(self._plan.query_chunks, self._plan.chunks) <= MOST_CELLS
        until = math.inf if is_exact else time.monotonic() + ABSORBING_SECONDS
        while self._before and time.monotonic() < until:
            index = self._before.pop()
            self._add(self._cells, group, index, self._there[index])
        attended = self._attended.get(group, [])
        while self._absorbed < len(attended) and time.monotonic() < until:
            self._add_left(self._cells, group, attended[self._absorbed])
            self._absorbed += 1

    def _add_left(self, cells: Counts, group: int, index: int) -> None:
        """Count the pairs of a subproblem, without those that were done before."""
        is_left = ~self._written
        is_left[self._there.get(index, [])] = False
        self._add(cells, group, index, is_left)

    def _add(self, cells: Counts, group: int, index: int, chunks: Sequence[int] | npt.NDArray[np.bool_]) -> None:
        """Count the pairs of a subproblem that have these query chunks."""
        chosen = np.zeros(self._plan.query_chunks, bool)
        chosen[chunks] = True
        query, key = self._division(group).pairs(index)
        (rows, columns), plan = cells.shape, self._plan
        places = query * rows // plan.query_chunks * columns + key * columns // plan.chunks
        cells += np.bincount(places[chosen[query]], minlength=cells.size).reshape(cells.shape)

    def _division(self, group: int) -> Division:
        return self._plan.division_of(group)

    def _done(self, group: int) -> int:
        return self._schedule.completed.get(group, 0) + (len(self._attended[group]) if group in self._attended else 0)

    def _total(self, group: int) -> int:
        entry = group // self._plan.problem.entry_groups
        if entry not in self._totals:
            self._totals[entry] = len(self._division(group).indices)
        return self._totals[entry]


def live_cells(live: LivePairs, chosen: npt.NDArray[np.bool_] | None = None) -> Counts:
    """The number of live chunk pairs in each cell of a matrix of at most `MOST_CELLS` rows and columns.

    Of those query chunks that are `chosen`, or of all.
    """
    rows, columns = (min(chunks, MOST_CELLS) for chunks in (live.query_chunks, live.key_chunks))
    edges = -(-np.arange(columns + 1) * live.key_chunks // columns)  # the first key chunk of each column
    found = np.zeros((rows, columns), np.int64)
    of = np.repeat(np.arange(live.query_chunks), np.diff(live.first))
    for row in range(rows):
        own = np.arange(*np.searchsorted(of * rows // live.query_chunks, (row, row + 1)))
        own = own if chosen is None else own[chosen[of[own]]]
        inside = np.clip(edges[None], live.starts[own, None], live.stops[own, None])
        found[row] = np.diff(inside, axis=1).sum(axis=0)
    return found
