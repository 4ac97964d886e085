"""The CPU lane: the kernel works where the chunks were staged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from oocattn import clock
from oocattn.division.base import Block
from oocattn.kernels import AttentionState, finalise, merge
from oocattn.kernels.settings import plain_threads
from oocattn.pipelines.failing import naming_subproblem
from oocattn.pipelines.lane.lane import Job, Lane, StagedChunks
from oocattn.pipelines.lane.tiles import key_tiles
from oocattn.pipelines.watch.events import Attended, Span


class CpuLane(Lane):
    """One worker's share of the processor's cores."""

    def __init__(self, job: Job) -> None:
        plan = job.plan
        problem = plan.problem
        self._partial = AttentionState.empty(problem.group_size, plan.chunk_rows, problem.head_dim)
        allocating = ThreadPoolExecutor(1, thread_name_prefix="oocattn-allocate")
        super().__init__(job, readers=1, allocating=allocating)
        allocating.shutdown(wait=False)  # when it has allocated
        # One thread attends, for every thread that does has OpenMP threads of its own, with their buffers.
        self._attending = plain_threads(1, "oocattn-attend")
        self._threads = self._attending.submit(torch.get_num_threads).result()
        self._attended: dict[int, Attended] = {}
        self._turn = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def close(self) -> None:
        super().close()
        self._attending.submit(torch.set_num_threads, self._threads)  # which also counts for threads that begin later
        self._attending.shutdown()

    def merge_states(self, into: AttentionState, partial: AttentionState) -> None:
        merge(into, partial)

    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        finalise(state, out, lse)

    def compute(self, turn: int) -> Attended:
        return self._attending.submit(self._attend_until, turn).result()

    def _attend_until(self, turn: int) -> Attended:
        with self.telling_the_first_error():
            if torch.get_num_threads() != self.plan.threads:
                torch.set_num_threads(self.plan.threads)
            while turn not in self._attended:
                staged = self._staged.pop(self._turn)
                with naming_subproblem(staged.head_group, staged.subproblem.index):
                    self._attended[self._turn] = self._attend(staged)
                self._turn += 1
            return self._attended.pop(turn)

    def _attend(self, staged: StagedChunks) -> Attended:
        start = clock.now()
        pairs = committed = 0
        for block in staged.subproblem.blocks:
            if block.query_chunk in staged.queries:  # else it is beyond the last token, or not wanted
                work = staged.head_group, block.query_chunk, staged.subproblem.index
                pairs += self._attend_block(staged, block, work)
                committed += self.partials.end(*work)
        stop = clock.now()
        return Attended(
            start=start,
            stop=stop,
            head_group=staged.head_group,
            index=staged.subproblem.index,
            pairs=pairs,
            partial_bytes=committed,
            spans=(Span("compute", start, stop),),
        )

    def _attend_block(self, staged: StagedChunks, block: Block, work: tuple[int, int, int]) -> int:
        """Compute one query chunk's partial, and count its pairs."""
        problem = self.plan.problem
        query = staged.queries[block.query_chunk]
        rows, every_key = query.shape[1], len(staged.key)
        destination = self.partials.begin(*work, staged.not_finite[block.query_chunk])
        state = self._partial.rows(0, rows) if destination.merged else destination.state
        state.reset()
        for tile in key_tiles(block, staged.key_rows, range(rows), every_key, problem.causal):
            key, value = (tensor[tile.keys.start : tile.keys.stop] for tensor in (staged.key, staged.value))
            for call in tile.calls:
                self.kernel.attend(query, key, value, state, scale=problem.scale, diagonal=call.diagonal)
                self.step()
        pairs = int(state.keys.sum()) * len(query)
        if destination.merged:
            merge(destination.state, state)
        return pairs
