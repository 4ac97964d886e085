"""A lane's device that is the CPU: the kernel works where the chunks were staged."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oocattn import clock
from oocattn.division.base import Block
from oocattn.kernels.state import AttentionState
from oocattn.operations import Operation
from oocattn.pipelines.lane.device import Health
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.partials.store import PartialStore, Sums
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended, Span
from oocattn.plain_threads import plain_threads
from oocattn.planning.memory import READERS
from oocattn.planning.plan import Plan
from oocattn.threads import ThreadPool


class CpuDevice:
    """One worker's share of the processor's cores. Implements Device; a launched subproblem is done."""

    readers = READERS["cpu"]

    def __init__(self, _name: str, plan: Plan, operation: Operation, health: Health) -> None:
        problem = plan.problem
        self._plan = plan
        self._operation = operation
        self._health = health
        self._state = AttentionState.empty(problem.group_size, plan.chunk_rows, problem.columns)
        self.cores = plan.threads
        self.allocator = ThreadPool(1, "oocattn-allocate")
        # One thread attends, for every thread that does has OpenMP threads of its own, with their buffers.
        self.launcher = plain_threads(1, "oocattn-attend", self.cores)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        self._operation.merge(into, state)

    def finalise(self, head_group: int, head: int, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        self._operation.finalise(head_group, head, state, out, lse)
        self._health.step()

    def close(self) -> None:
        self.allocator.shutdown()
        self.launcher.shutdown()
        del self._state

    def launch(self, staged: StagedChunks, partials: PartialStore, finisher: Finisher) -> Callable[[], Attended]:
        start = clock.now()
        pairs = partial_bytes = 0
        for block in staged.blocks:
            attended, sums = self._attend_chunk(staged, block, partials)
            pairs += attended
            partial_bytes += partials.end(staged.head_group, block.query_chunk, staged.index, sums)
        stop = clock.now()
        event = Attended(
            start=start,
            stop=stop,
            head_group=staged.head_group,
            index=staged.index,
            pairs=pairs,
            partial_bytes=partial_bytes,
            spans=(Span("compute", start, stop),),
        )
        return lambda: event

    def _attend_chunk(self, staged: StagedChunks, block: Block, partials: PartialStore) -> tuple[int, Sums]:
        """Compute one query chunk's partial; return its pairs, and what is summed over its rows."""
        chunk, operation = block.query_chunk, self._operation
        query, rows = staged.queries[chunk], self._plan.query_rows(chunk)
        heads, pairs = len(query[0]), 0
        destination = partials.begin(staged.head_group, chunk, staged.index, staged.not_finite[chunk])
        state = self._state.heads(0, heads).rows(0, len(rows)) if destination.merged else destination.state
        state.reset()

        def tell(more: int) -> None:
            self._health.attended(more * heads)

        sums = operation.begin_sums(staged.head_group, block, staged.rows)
        for tile in operation.tiles(staged.head_group, block, staged.rows, rows, max(1, staged.rows.key_total)):
            keys = [tensor[:, tile.keys.start : tile.keys.stop] for tensor in staged.keys]
            before, of_tile = self._health.pairs, tile.pairs * heads
            operation.compute(staged.head_group, tile, query, keys, state, tell, sums)
            self._health.attended(before + of_tile - self._health.pairs)
            pairs += of_tile
        if destination.merged:
            self._operation.merge(destination.state, state)
        return pairs, [] if sums is None else sums.arrays
