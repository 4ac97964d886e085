"""What a run of a division takes, in numbers and bytes: reads, calls, partials, tasks, files. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from oocattn.planning.layout import Candidate, Layout
from oocattn.planning.live import keys_needed, row_edges
from oocattn.planning.memory import READ_BYTES, partial_file_bytes, sums_bytes
from oocattn.planning.options import MOST_UNFINISHED, TASK_PIECE
from oocattn.planning.work import Work, work_of
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div


@dataclass(frozen=True)
class Amounts:
    """The amounts of a candidate, laid out for so many lanes on such a device ("cpu" or "cuda")."""

    candidate: Candidate
    layout: Layout
    problem: Problem
    lanes: int
    device: str

    @cached_property
    def work(self) -> list[Work]:
        """The head groups by their mask."""
        divided = self.layout.grid, self.candidate.decomposition, self.candidate.span
        return [
            work_of(mask, entries * self.problem.entry_groups, *divided)
            for mask, entries in self.problem.sampled_masks.items()
        ]

    def total(self, amount: Callable[[Work], int]) -> int:
        """An amount over all head groups."""
        return sum(work.head_groups * amount(work) for work in self.work)

    @cached_property
    def subproblems(self) -> int:
        """Subproblems of the run."""
        return self.total(lambda work: work.subproblems)

    @cached_property
    def handed_back(self) -> int:
        """Partials of the run."""
        return self.total(lambda work: work.query_chunks)

    @property
    def held(self) -> int:
        """Accumulators that a checkpoint saves, over all lanes."""
        everything = self.problem.head_groups * self.candidate.query_chunks
        return self.lanes * min(self.candidate.accumulators, everything)

    @property
    def partial_file(self) -> int:
        """Bytes of a partial's file."""
        return partial_file_bytes(self.problem, self.layout.chunk_rows)

    def scratch_disk(self, *, saved: bool) -> float:
        """Bytes that partials, and sums over their rows, take on disk at most at a time; those in memory where `saved`."""
        chunk_rows = ceil_div(self.problem.out_rows, self.candidate.query_chunks)
        sums = sums_bytes(self.problem, self.handed_back, self.total(lambda work: work.keys_of_blocks), chunk_rows)
        if self.candidate.partials == "disk":
            # Head groups whose chunks are not written yet.
            waiting = (MOST_UNFINISHED + 4 * TASK_PIECE) * self.lanes / self.candidate.query_chunks
            of_group = max(work.query_chunks for work in self.work)
            return sums + min(self.problem.head_groups, 2 + waiting) * of_group * self.partial_file
        return sums + ((self.held + self.lanes) * self.partial_file if saved else 0)  # a lane replaces one

    @property
    def group_heads(self) -> float:
        """Query heads of a head group, in the mean."""
        return self.problem.out_heads / self.problem.entry_groups

    @property
    def gap_reads(self) -> float:
        """Reads that gaps within chunks add."""
        return self.group_heads * self.total(lambda work: work.query_gaps) + 2 * self.total(lambda work: work.key_gaps)

    @property
    def reads(self) -> float:
        """Reads of chunks, or of parts of them between gaps."""
        return self.group_heads * self.handed_back + 2 * self.total(lambda work: work.key_chunks) + self.gap_reads

    @property
    def reads_in_pieces(self) -> float:
        """The same where several threads read, each so many bytes at a time."""
        return max(self.reads, sum(self.staged) / READ_BYTES["cuda"])

    @cached_property
    def staged(self) -> tuple[float, float]:
        """Bytes of queries that are staged, and of keys."""
        queries = self.handed_back * self.layout.chunk_rows * self.problem.query_row_bytes * self.group_heads
        return queries, self.total(lambda work: work.keys) * self.problem.kv_row_bytes

    @cached_property
    def keys_copied(self) -> int:
        """Keys that go to a GPU for tiles of queries, over all head groups: those that any of their rows attends."""
        rows = min(self.layout.tiles.query, self.layout.chunk_rows)

        def of_group(work: Work) -> int:
            simple = work.mask.is_simple
            return ceil_div(work.pairs, rows) if simple else keys_needed(work.mask, self.layout.grid, rows)[0]

        return self.total(of_group)

    @property
    def query_tiles(self) -> int:
        """Query tiles of all partials, on a GPU."""
        return self.handed_back * ceil_div(self.layout.chunk_rows, self.layout.tiles.query)

    @property
    def calls(self) -> float:
        """Calls of a kernel on a GPU: one at least for each query tile."""
        return max(self.keys_copied / self.layout.tiles.key, self.query_tiles)

    @cached_property
    def tasks(self) -> int:
        """Tasks of the run."""
        return 2 * (self.subproblems + self.problem.head_groups * self.candidate.query_chunks)

    @cached_property
    def balance(self) -> float:
        """The share of all pairs of the busiest lane, as `pipelines.schedule` divides."""
        problem, lanes = self.problem, self.lanes
        if lanes == 1:
            return 1.0
        if self.candidate.partials == "disk":
            subproblems = max(1, self.subproblems)
            return ceil_div(subproblems, lanes) / subproblems
        rounds, rest = divmod(problem.head_groups, lanes)
        if not rest:
            return rounds / problem.head_groups
        work = self.work[0]
        pairs = np.asarray(work.mask.pairs_between(row_edges(self.layout.grid, self.layout.chunk_rows)), np.float64)
        of_lanes = np.bincount(work.division.chunk_lanes(lanes), weights=pairs, minlength=lanes)
        most = np.sum([np.roll(of_lanes, group) for group in range(rest)], axis=0).max()  # the next one's begin one lane on
        return (rounds + float(most / max(1.0, pairs.sum()))) / problem.head_groups

    @property
    def out_chunks(self) -> int:
        """Chunks of `out`, of which each has a file, and one of `lse`."""
        return self.problem.batch * self.problem.out_heads * ceil_div(self.problem.out_rows, self.layout.out_chunk_rows)

    @property
    def chunk_files(self) -> int:
        """Files of finished query chunks: `out`, `lse` and an entry of the journal."""
        return self.problem.head_groups * ceil_div(self.problem.out_rows, self.layout.chunk_rows) + 2 * self.out_chunks

    @cached_property
    def last_share(self) -> float:
        """The share of all rows that is written after the last computing; on a GPU that of the last tiles only."""
        layout = self.layout
        last = layout.query_chunks * layout.chunk_rows
        if self.device == "cuda" and self.candidate.partials == "memory":
            tile = layout.chunk_rows % layout.tiles.query or layout.tiles.query  # the last one
            last = layout.chunk_rows - (layout.chunk_rows - tile) // layout.out_chunk_rows * layout.out_chunk_rows
        return min(1.0, self.lanes * last / (self.candidate.query_chunks * layout.chunk_rows * self.problem.head_groups))
