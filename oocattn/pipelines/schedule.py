"""Which lane does what, and in which order: pure arithmetic over a plan and a number of lanes.

Partials in memory: a lane takes whole head groups, every `lanes`-th one, because their accumulators live with it.
Partials on disk: subproblems and chunks are dealt out one by one. In both, results do not depend on the number of lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oocattn.plans import Plan


@dataclass(frozen=True)
class Schedule:
    """The assignment of a plan's subproblems and chunks to `lanes` lanes."""

    plan: Plan
    lanes: int

    def subproblem_lane(self, head_group: int, index: int) -> int:
        """The lane that stages and attends a subproblem."""
        if self.plan.partials == "memory":
            return head_group % self.lanes
        return (head_group * self.plan.division.subproblems + index) % self.lanes

    def chunk_lane(self, head_group: int, chunk: int) -> int:
        """The lane that merges and writes a query chunk."""
        if self.plan.partials == "memory":
            return head_group % self.lanes
        return (head_group * self.plan.chunks + chunk) % self.lanes

    def order(self) -> Iterator[tuple[int, int]]:
        """All (head group, subproblem) in the order of submission; lanes that work on head groups of their own alternate."""
        apart = self.lanes if self.plan.partials == "memory" else 1
        for first in range(0, self.plan.problem.head_groups, apart):
            for index in range(self.plan.division.subproblems):
                for head_group in range(first, min(first + apart, self.plan.problem.head_groups)):
                    yield head_group, index
