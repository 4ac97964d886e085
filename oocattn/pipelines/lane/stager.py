"""Staging: a subproblem's chunks are read into host memory for a device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from oocattn import clock
from oocattn.division.base import Block, Subproblem
from oocattn.operations import Operation
from oocattn.operations.base import Input
from oocattn.operations.staging import MOST_KEPT_DOCUMENTS, Run, StagedRows, stage_rows
from oocattn.operations.tiles import pieces
from oocattn.pipelines.lane.memory import as_numpy
from oocattn.pipelines.lane.readers import Read, Readers
from oocattn.pipelines.watch.events import Span, Staged
from oocattn.planning.interleaving import held_heads, held_tokens
from oocattn.planning.memory import READ_BYTES
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Mask
from oocattn.storage.inputs.ahead import cut_at_multiples
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.held import Rows, hold
from oocattn.units import round_up

KEPT_SUBPROBLEMS = 256  # whose rows are kept for the next head group


@dataclass(frozen=True)
class StagedChunks:
    """A subproblem in a staging slot: query inputs by chunk, key inputs in one piece.

    They are [heads, n, ...]: of a query chunk all rows, of which those that nobody needs are 0; of keys those that are
    needed.
    `not_finite` counts, by query chunk, the elements that are NaN or Inf of rows that are counted with its partial.
    """

    head_group: int
    subproblem: Subproblem
    rows: StagedRows
    queries: dict[int, tuple[torch.Tensor, ...]]
    keys: tuple[torch.Tensor, ...]
    not_finite: Counter[int] = field(default_factory=Counter)

    @property
    def index(self) -> int:
        """Of the subproblem."""
        return self.subproblem.index

    @property
    def blocks(self) -> Iterator[Block]:
        """The blocks to attend; others are not wanted."""
        return (block for block in self.subproblem.blocks if block.query_chunk in self.queries)


class Turns:
    """Numbers of a lane's subproblems, each to be taken once.

    Those that share a staging slot come in their order. Dask runs a task again whose result is not there any more,
    where another worker dies with what was made of it. To stage it again would put other chunks under a subproblem
    that is being attended.
    """

    def __init__(self, action: str, slots: int) -> None:
        self._action = action
        self._next = list(range(slots))

    def take(self, turn: int) -> None:
        """Take a turn. Raises RuntimeError where it is not the next one of its slot."""
        slot = turn % len(self._next)
        if turn != self._next[slot]:
            raise RuntimeError(f"asked to {self._action} turn {turn} where {self._next[slot]} is next")
        self._next[slot] += len(self._next)


class Stager:
    """Reads a dataset into staging slots by `readers` threads, a `step` each piece."""

    def __init__(
        self,
        plan: Plan,
        operation: Operation,
        dataset: Dataset,
        slots: Sequence[Future[torch.Tensor]],
        readers: int,
        step: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._operation = operation
        held, tokens = held_heads(plan.problem, plan.inputs, plan.held_groups), held_tokens(plan.problem, plan.inputs)
        self._arrays = hold(dataset.arrays, held, tokens)
        self._slots = slots
        self._turns = Turns("stage", len(slots))
        self._staged: dict[int, StagedChunks] = {}
        self._rows: dict[tuple[Mask, int], StagedRows] = {}
        self._ahead = plan.inputs.ahead
        self._readers = Readers(readers, self._ahead, step)

    def stage(self, turn: int, head_group: int, index: int, wanted: Collection[int] | None = None) -> Staged:
        """Read a subproblem into a staging slot; `turn` counts this lane's from 0.

        Of its query chunks only those that are `wanted` are attended (default: all): the others' partials are there. Raises
        RuntimeError for a turn that was taken before.
        """
        self._turns.take(turn)
        start = clock.now()
        slot = self._slots[turn % len(self._slots)].result()
        subproblem = self._plan.division_of(head_group).subproblem(index)
        rows = self._rows_of(head_group, subproblem)
        chunks = [chunk for chunk in subproblem.query_chunks if wanted is None or chunk in wanted]
        self._staged[turn] = staged = self._lay_out(slot, head_group, subproblem, rows, chunks)
        reads = list(self._reads(staged))
        arrays, found = set(), self._readers.carry_out(reads, turn)
        for read, (_, not_finite) in zip(reads, found, strict=True):
            if not_finite and read.counted_for is not None:
                staged.not_finite[read.counted_for] += not_finite
                arrays.add(read.array.name)
        stop = clock.now()
        reading = min((begun for begun, _ in found), default=stop)  # before, it waited for its slot and the readers
        return Staged(
            start=start,
            stop=stop,
            head_group=head_group,
            index=index,
            bytes=sum(read.out.nbytes for read in reads),
            spans=(Span("read", reading, stop),),
            not_finite=tuple(sorted(arrays)),
        )

    def take(self, turn: int) -> StagedChunks:
        """Hand over a turn's chunks; the slot is used again when they are attended."""
        return self._staged.pop(turn)

    def close(self) -> None:
        """Let go of what was staged; nothing is read any more."""
        self._readers.close()
        self._staged.clear()
        self._arrays.clear()
        self._rows.clear()

    def _rows_of(self, head_group: int, subproblem: Subproblem) -> StagedRows:
        """The rows of a subproblem, the same for each head group of its mask."""
        mask = self._plan.mask(head_group)
        if mask.documents > MOST_KEPT_DOCUMENTS:
            return stage_rows(self._plan, head_group, subproblem)
        place = (mask, subproblem.index)
        rows = self._rows.get(place) or stage_rows(self._plan, head_group, subproblem)
        if place not in self._rows and len(self._rows) == KEPT_SUBPROBLEMS:
            self._rows.clear()
        return self._rows.setdefault(place, rows)

    def _lay_out(
        self, slot: torch.Tensor, head_group: int, subproblem: Subproblem, rows: StagedRows, query_chunks: Iterable[int]
    ) -> StagedChunks:
        """Lay out a slot: query inputs chunk by chunk, then each input of all keys."""
        group, used = self._plan.problem.head_group(head_group), 0

        def take(source: Input, count: int) -> torch.Tensor:
            nonlocal used
            shape = source.shape(len(self._operation.heads(source.name, group)), count)
            start = round_up(used, source.dtype.itemsize)
            used = start + math.prod(shape) * source.dtype.itemsize
            return slot[start:used].view(source.dtype).view(shape)

        queries = {}
        for chunk in query_chunks:
            if count := len(self._plan.query_rows(chunk)):
                queries[chunk] = tuple(take(source, count) for source in self._operation.query_inputs)
                if sum(len(run.rows) for run in rows.queries[chunk]) < count:
                    for tensor in queries[chunk]:
                        tensor.zero_()
        keys = tuple(take(source, rows.key_total) for source in self._operation.key_inputs)
        return StagedChunks(head_group, subproblem, rows, queries, keys)

    def _reads(self, staged: StagedChunks) -> Iterator[Read]:
        """The reads that fill a subproblem's slot, cut to pieces where the array's chunk files are read directly."""
        for chunk, query in staged.queries.items():
            for source, tensor in zip(self._operation.query_inputs, query, strict=True):
                for head in range(len(tensor)):
                    yield from self._reads_of_runs(staged, source, head, tensor, staged.rows.queries[chunk])
        for source, tensor in zip(self._operation.key_inputs, staged.keys, strict=True):
            for head in range(len(tensor)):
                for runs in staged.rows.keys.values():
                    yield from self._reads_of_runs(staged, source, head, tensor, runs)

    def _reads_of_runs(
        self, staged: StagedChunks, source: Input, head: int, tensor: torch.Tensor, runs: Iterable[Run]
    ) -> Iterator[Read]:
        """The reads of some runs of a head of an input."""
        group = self._plan.problem.head_group(staged.head_group)
        array, of_head = self._arrays[source.name], self._operation.heads(source.name, group)[head]
        counted = self._operation.owns(source.name, staged.head_group) and not (group.batch and array.of_all_batches)
        out = as_numpy(tensor)[head]
        for run in runs:
            counted_for = run.counted_for if run.counted_for in staged.queries and counted else None
            for part in self._parts(array, source, run.rows, out[:1].nbytes):
                place = run.part(part).place
                tokens = range(part.start - source.first, part.stop - source.first)
                yield Read(array, group.batch, of_head, tokens, out[place.start : place.stop], counted_for)

    def _parts(self, array: Rows, source: Input, rows: range, row_bytes: int) -> Iterable[range]:
        """Rows of an array in the pieces that are read one by one."""
        if not rows:
            return ()
        if array.direct:
            return pieces(rows, max(1, READ_BYTES[self._plan.device] // row_bytes))
        if not (self._ahead and array.is_remote):
            return (rows,)
        cut = cut_at_multiples(range(rows.start - source.first, rows.stop - source.first), array.ahead_rows)
        return (range(part.start + source.first, part.stop + source.first) for part in cut)
