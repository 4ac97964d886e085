"""Which lane does what, and in which order: pure arithmetic over a plan, a number of lanes, and what is done already.

Partials in memory: a lane takes all that contributes to the query chunks it takes, because their accumulators live with it.
Those are whole head groups, every `lanes`-th one, with cyclic quorums, and with strips query chunks (`chunk_lanes`).
Partials on disk: subproblems and chunks are dealt out one by one. In both, results do not depend on the number of lanes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property

from oocattn.planning.plan import Plan


@dataclass(frozen=True)
class CompletedWork:
    """Written query chunks (head group, chunk), and partials (head group, chunk, subproblem) that are there."""

    chunks: Set[tuple[int, int]] = field(default_factory=frozenset)
    partials: Set[tuple[int, int, int]] = field(default_factory=frozenset)


NOTHING_COMPLETED = CompletedWork()


@dataclass(frozen=True)
class Schedule:
    """The assignment of what is left of a plan's subproblems and chunks to `lanes` lanes."""

    plan: Plan
    lanes: int
    done: CompletedWork = NOTHING_COMPLETED

    def subproblem_lane(self, head_group: int, index: int) -> int:
        """The lane that stages and attends a subproblem."""
        if self.plan.partials == "memory":
            return self.chunk_lane(head_group, self.plan.division.subproblem(index).query_chunks[0])
        return (head_group * self.plan.division.subproblems + index) % self.lanes

    def chunk_lane(self, head_group: int, chunk: int) -> int:
        """The lane that merges and writes a query chunk."""
        if self.plan.partials == "memory":
            return (head_group + self._chunk_lanes[chunk]) % self.lanes
        return (head_group * self.plan.chunks + chunk) % self.lanes

    @cached_property
    def _chunk_lanes(self) -> list[int]:
        """The lane of each query chunk of the first head group, with partials in memory."""
        return list(map(int, self.plan.division.chunk_lanes(self.lanes)))

    def wanted(self, head_group: int, index: int) -> tuple[int, ...]:
        """The query chunks of which a subproblem has still to compute the partial: those that hold tokens, at most."""
        return tuple(
            chunk
            for chunk in self.plan.division.subproblem(index).query_chunks
            if self.plan.tokens(chunk)
            and (head_group, chunk) not in self.done.chunks
            and (head_group, chunk, index) not in self.done.partials
        )

    def contributors(self, head_group: int, chunk: int) -> tuple[int, ...]:
        """The subproblems that have still to contribute to a query chunk that is not written, in order."""
        everyone = self.plan.division.contributors(chunk)
        return tuple(index for index in everyone if (head_group, chunk, index) not in self.done.partials)

    def order(self) -> Iterator[tuple[int, int]]:
        """All (head group, subproblem) that are left, in the order of submission: where each lane has its own, in turn."""
        if self.plan.partials == "disk":
            for head_group in range(self.plan.problem.head_groups):
                yield from self._left_of(head_group, range(self.plan.division.subproblems))
        else:
            for places in itertools.zip_longest(*map(self._order_of, range(self.lanes))):
                yield from filter(None, places)

    def _order_of(self, lane: int) -> Iterator[tuple[int, int]]:
        """What is left for one lane, with partials in memory."""
        division = self.plan.division
        for head_group in range(self.plan.problem.head_groups):
            chunks = [chunk for chunk in range(division.chunks) if self.chunk_lane(head_group, chunk) == lane]
            shared = len(chunks) < division.chunks  # so no subproblem contributes to two chunks
            of_chunks = itertools.chain.from_iterable(map(division.contributors, chunks))
            yield from self._left_of(head_group, of_chunks if shared else range(division.subproblems))

    def _left_of(self, head_group: int, indices: Iterable[int]) -> Iterator[tuple[int, int]]:
        return ((head_group, index) for index in indices if self.wanted(head_group, index))

    @cached_property
    def left(self) -> int:
        """How many subproblems are left. It takes time for what is done, not for the head groups that nobody has begun."""
        filled = filter(self.plan.tokens, range(self.plan.chunks))
        needed = Counter(itertools.chain.from_iterable(map(self.plan.division.contributors, filled)))
        contributed: Counter[tuple[int, int]] = Counter()  # to how many chunks with tokens, by head group and subproblem
        for head_group, chunk in self.done.chunks:
            if self.plan.tokens(chunk):
                contributed.update((head_group, index) for index in self.plan.division.contributors(chunk))
        for head_group, chunk, index in self.done.partials:
            if self.plan.tokens(chunk) and (head_group, chunk) not in self.done.chunks:
                contributed[head_group, index] += 1
        finished = sum(needed[index] == count for (_, index), count in contributed.items())
        return len(needed) * self.plan.problem.head_groups - finished

    def complete(self) -> Iterator[tuple[int, int]]:
        """All (head group, chunk) whose partials are all there, but which are not written."""
        for head_group in range(self.plan.problem.head_groups):
            for chunk in range(self.plan.chunks):
                written = not self.plan.tokens(chunk) or (head_group, chunk) in self.done.chunks
                if not written and not self.contributors(head_group, chunk):
                    yield head_group, chunk
