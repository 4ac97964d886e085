"""Which lane does what, and in which order: pure arithmetic over a plan, a number of lanes, and what is done already.

Partials in memory: a lane takes all that contributes to the query chunks it takes, because their accumulators live with it.
Those are whole head groups, every `lanes`-th one, with cyclic quorums, and with strips query chunks (`chunk_lanes`).
Partials on disk: subproblems and chunks are dealt out one by one. In both, results do not depend on the number of lanes.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property

from oocattn.division.base import Division, Subproblem
from oocattn.planning.plan import Plan

MOST_COUNTED_CHUNKS = 256  # of whose partials each is counted; of more, that takes seconds


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
            chunk = 0 if self.plan.decomposition == "cqs" else self._subproblem(head_group, index).query_chunks[0]
            return self.chunk_lane(head_group, chunk)
        return (self._before(head_group) + index) % self.lanes

    def chunk_lane(self, head_group: int, chunk: int) -> int:
        """The lane that merges and writes a query chunk."""
        if self.plan.partials == "memory":
            return (head_group + self._chunk_lanes[chunk]) % self.lanes
        return (head_group * self.plan.query_chunks + chunk) % self.lanes

    @cached_property
    def _chunk_lanes(self) -> list[int]:
        """The lane of each query chunk of the first head group, with partials in memory."""
        return list(map(int, self.plan.division_of(0).chunk_lanes(self.lanes)))

    def _before(self, head_group: int) -> int:
        """Subproblems of the head groups before one, with those that own no live pair."""
        batch, of_entry = divmod(head_group, self.plan.problem.entry_groups)
        before, after = self._before_entries[batch : batch + 2]
        return before + (after - before) // self.plan.problem.entry_groups * of_entry

    @cached_property
    def _before_entries(self) -> list[int]:
        """Subproblems of the batch entries before each, and of all."""
        groups = self.plan.problem.entry_groups
        indices = (self.plan.division_of(batch * groups).indices for batch in range(self.plan.problem.batch))
        return [0, *itertools.accumulate(groups * (each[-1] + 1) if each else 0 for each in indices)]

    def _subproblem(self, head_group: int, index: int) -> Subproblem:
        return self.plan.division_of(head_group).subproblem(index)

    def wanted(self, head_group: int, index: int) -> tuple[int, ...]:
        """The query chunks of which a subproblem has still to compute the partial: those that hold tokens, at most."""
        return tuple(
            chunk
            for chunk in self._subproblem(head_group, index).query_chunks
            if self.plan.query_rows(chunk)
            and (head_group, chunk) not in self.done.chunks
            and (head_group, chunk, index) not in self.done.partials
        )

    def contributors(self, head_group: int, chunk: int) -> tuple[int, ...]:
        """The subproblems that have still to contribute to a query chunk that is not written, in order."""
        everyone = self.plan.division_of(head_group).contributors(chunk)
        return tuple(index for index in everyone if (head_group, chunk, index) not in self.done.partials)

    def order(self) -> Iterator[tuple[int, int]]:
        """All (head group, subproblem) that are left, in the order of submission: where each lane has its own, in turn."""
        if self.plan.partials == "disk":
            for head_group in range(self.plan.problem.head_groups):
                yield from self._left_of(head_group, self.plan.division_of(head_group).indices)
        else:
            for places in itertools.zip_longest(*map(self._order_of, range(self.lanes))):
                yield from filter(None, places)

    def _order_of(self, lane: int) -> Iterator[tuple[int, int]]:
        """What is left for one lane, with partials in memory."""
        for head_group in range(self.plan.problem.head_groups):
            division, everything = self.plan.division_of(head_group), range(self.plan.query_chunks)
            chunks = [chunk for chunk in everything if self.chunk_lane(head_group, chunk) == lane]
            shared = len(chunks) < len(everything)  # so no subproblem contributes to two chunks
            of_chunks = itertools.chain.from_iterable(map(division.contributors, chunks))
            yield from self._left_of(head_group, of_chunks if shared else division.indices)

    def _left_of(self, head_group: int, indices: Iterable[int]) -> Iterator[tuple[int, int]]:
        return ((head_group, index) for index in indices if self.wanted(head_group, index))

    @cached_property
    def left(self) -> int:
        """How many subproblems are left. It takes time for what is done, not for the head groups that nobody has begun."""
        total = sum(count * len(self._chunks_needing(division)) for division, count in self.plan.divisions.items())
        return total - sum(self.completed.values())

    @cached_property
    def pairs_left(self) -> int:
        """How many query-key pairs are left, of all heads. Of many chunks it is an estimate."""
        partials = (place for place in self.done.partials if place[:2] not in self.done.chunks)
        problem, done = self.plan.problem, 0
        for count, places in ((self._pairs_of_chunk, self.done.chunks), (self._pairs_of_partial, partials)):
            done += sum(count(*place) * len(problem.head_group(place[0]).query_heads) for place in places)
        return max(0, problem.pairs - done)

    def _pairs_of_chunk(self, head_group: int, chunk: int) -> int:
        """The pairs of a query chunk and one head."""
        place = (head_group // self.plan.problem.entry_groups, chunk)
        if place not in self._chunk_pairs:
            rows = self.plan.query_rows(chunk)
            self._chunk_pairs[place] = self.plan.mask(head_group).pairs(rows)
        return self._chunk_pairs[place]

    def _pairs_of_partial(self, head_group: int, chunk: int, index: int) -> int:
        """The pairs of a partial and one head: counted, or of many chunks its share of the query chunk's chunk pairs."""
        plan = self.plan
        place = (head_group // plan.problem.entry_groups, chunk, index)
        if place not in self._partial_pairs:
            block = next(each for each in self._subproblem(head_group, index).blocks if each.query_chunk == chunk)
            if plan.chunks > MOST_COUNTED_CHUNKS:
                live = int(plan.division_of(head_group).live.counts[chunk])
                pairs = self._pairs_of_chunk(head_group, chunk) * len(block.key_chunks) // live
            else:
                rows, mask = plan.query_rows(chunk), plan.mask(head_group)
                keys = (plan.grid.keys(each, mask.keys) for each in block.key_chunks)
                pairs = sum(mask.pairs(rows, each) for each in keys)
            self._partial_pairs[place] = pairs
        return self._partial_pairs[place]

    @cached_property
    def _chunk_pairs(self) -> dict[tuple[int, int], int]:
        return {}

    @cached_property
    def _partial_pairs(self) -> dict[tuple[int, int, int], int]:
        return {}

    @cached_property
    def completed(self) -> dict[int, int]:
        """How many subproblems need not be done again, by head group of which something is done."""
        contributed: dict[int, Counter[int]] = defaultdict(Counter)  # by head group: to how many chunks, by subproblem
        for head_group, chunk in filter(lambda place: self.plan.query_rows(place[1]), self.done.chunks):
            contributed[head_group].update(self.plan.division_of(head_group).contributors(chunk))
        for head_group, chunk, index in self.done.partials:
            if (head_group, chunk) not in self.done.chunks:
                contributed[head_group][index] += 1
        completed = {}
        for head_group, counts in contributed.items():
            needed = self._chunks_needing(self.plan.division_of(head_group))
            completed[head_group] = sum(needed[index] == count for index, count in counts.items())
        return completed

    def _chunks_needing(self, division: Division) -> Counter[int]:
        """To how many query chunks, that have rows, each subproblem contributes."""
        if division not in self._needed:
            filled = filter(self.plan.query_rows, range(self.plan.query_chunks))
            self._needed[division] = Counter(itertools.chain.from_iterable(map(division.contributors, filled)))
        return self._needed[division]

    @cached_property
    def _needed(self) -> dict[Division, Counter[int]]:
        return {}

    def complete(self) -> Iterator[tuple[int, int]]:
        """All (head group, chunk) whose partials are all there, but which are not written."""
        for head_group in range(self.plan.problem.head_groups):
            for chunk in range(self.plan.query_chunks):
                written = not self.plan.query_rows(chunk) or (head_group, chunk) in self.done.chunks
                if not written and not self.contributors(head_group, chunk):
                    yield head_group, chunk
