"""Partials in files of their own, merged when the last of a chunk is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.memory import States
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId, row_blocks
from oocattn.pipelines.lane.partials.store import (
    Accumulators,
    DamagedPartialError,
    Destination,
    MergedChunk,
    Sums,
    of_chunk,
)
from oocattn.planning.plan import Plan
from oocattn.storage.files.operations import shows_damage, words_of

MergeStates = Callable[[AttentionState, AttentionState], None]
"""Merge the second state, free afterwards, into the first; both on the host."""


class DiskPartials:
    """A file for each partial, for accumulators that do not fit in memory. Implements PartialStore."""

    def __init__(self, plan: Plan, files: PartialFiles, states: Mapping[str, States], merge_states: MergeStates) -> None:
        self._plan = plan
        self._files = files
        self._merge_states = merge_states
        self._accumulators = Accumulators(plan, states["accumulators"])
        self._buffers, self._blocks = states["buffers"], states["blocks"]
        self._in_flight: dict[tuple[int, int, int], tuple[AttentionState, int]] = {}

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        buffer = self._buffers.take()
        self._in_flight[head_group, chunk, subproblem] = buffer, not_finite
        return Destination(of_chunk(self._plan, buffer, head_group, chunk), merged=False)

    def save_pending(self, head_group: int, chunk: int) -> bool:
        return False

    def end(self, head_group: int, chunk: int, subproblem: int, sums: Sums = ()) -> int:
        buffer, not_finite = self._in_flight.pop((head_group, chunk, subproblem))
        state = of_chunk(self._plan, buffer, head_group, chunk)
        partial = PartialId(head_group, chunk, (subproblem,))
        try:
            return self._files.write_sums(partial, sums) + self._files.write(partial, state, not_finite)
        finally:
            self._buffers.put(buffer)

    def collect(self, head_group: int, chunk: int) -> MergedChunk:
        state = self._accumulators.take(head_group, chunk)
        state.reset()
        not_finite = 0
        for subproblem in self._plan.division_of(head_group).contributors(chunk):
            partial = PartialId(head_group, chunk, (subproblem,))
            try:
                with self._files.fetched(partial):
                    not_finite += self._files.not_finite(partial)
                    self._merge(partial, state)
            except BaseException as error:
                self._accumulators.give_back(head_group, chunk)
                if not shows_damage(error):
                    raise
                self._files.remove(partial)
                raise DamagedPartialError(words_of(error), head_group, chunk, subproblem) from error
        return MergedChunk(state, not_finite)

    def _merge(self, partial: PartialId, state: AttentionState) -> None:
        """Merge a partial's file into the state by blocks; a damaged one is half merged."""
        into = row_blocks(state)
        block = self._blocks.take()
        try:
            buffers = [block.heads(0, len(rows.num)).rows(0, len(rows.keys)) for rows in into]
            for index in self._files.read(partial, buffers):
                self._merge_states(into[index], buffers[index])
        finally:
            self._blocks.put(block)

    def release(self, head_group: int, chunk: int) -> None:
        self._accumulators.give_back(head_group, chunk)
        for subproblem in self._plan.division_of(head_group).contributors(chunk):
            self._files.remove(PartialId(head_group, chunk, (subproblem,)))

    def save(self, patient: bool, recent: float = 0.0) -> int:
        return 0  # a partial that has come is in its file

    def stop_waiting(self) -> None:
        """`save` waits for nothing."""

    def close(self) -> None:
        self._in_flight.clear()
        self._accumulators.close()
