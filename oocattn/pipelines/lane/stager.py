"""Staging: a subproblem's chunks are read into host memory for a device."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch

from oocattn import clock
from oocattn.division.base import Block, Subproblem
from oocattn.operations import Operation
from oocattn.operations.tiles import pieces, staged_keys
from oocattn.pipelines.lane.memory import as_numpy
from oocattn.pipelines.lane.not_finite import count_not_finite
from oocattn.pipelines.watch.events import Span, Staged
from oocattn.planning.plan import Plan
from oocattn.problem.problem import HeadGroup
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.readers import InputArray
from oocattn.threads import ThreadPool

READ_BYTES = 8 << 20
"""Bytes that one thread reads at a time where several read."""


@dataclass(frozen=True)
class StagedChunks:
    """A subproblem in a staging slot: query inputs by chunk, key inputs in one piece.

    They are [g, n, D] and [rows, D]. `not_finite` counts, by query chunk whose diagonal it owns, the elements of the
    chunk's rows that are NaN or Inf.
    """

    head_group: int
    subproblem: Subproblem
    queries: dict[int, tuple[torch.Tensor, ...]]
    keys: tuple[torch.Tensor, ...]
    key_rows: dict[int, range]
    not_finite: Counter[int] = field(default_factory=Counter)

    @property
    def index(self) -> int:
        """Of the subproblem."""
        return self.subproblem.index

    @property
    def blocks(self) -> Iterator[Block]:
        """The blocks to attend; others lie beyond the last token or are not wanted."""
        return (block for block in self.subproblem.blocks if block.query_chunk in self.queries)

    @property
    def nbytes(self) -> int:
        """Bytes of its chunks."""
        return sum(tensor.nbytes for tensor in (*itertools.chain(*self.queries.values()), *self.keys))


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
        self._dataset = dataset
        self._slots = slots
        self._step = step
        self._turns = Turns("stage", len(slots))
        self._staged: dict[int, StagedChunks] = {}
        self._readers = ThreadPool(readers, "oocattn-read")
        self._one_reader = readers == 1
        self._decoding = threading.Lock()

    def stage(self, turn: int, head_group: int, index: int, wanted: Collection[int] | None = None) -> Staged:
        """Read a subproblem into a staging slot; `turn` counts this lane's from 0.

        Of its query chunks only those that are `wanted` are attended (default: all): the others' partials are there. Raises
        RuntimeError for a turn that was taken before.
        """
        self._turns.take(turn)
        start = clock.now()
        slot = self._slots[turn % len(self._slots)].result()
        subproblem = self._plan.division.subproblem(index)
        chunks = [chunk for chunk in subproblem.query_chunks if wanted is None or chunk in wanted]
        self._staged[turn] = staged = self._lay_out(slot, head_group, subproblem, chunks)
        reads = list(self._reads(staged))
        for read, not_finite in zip(reads, self._read_all(reads), strict=True):
            staged.not_finite[read.chunk] += not_finite
        stop = clock.now()
        spans = (Span("read", start, stop),)
        return Staged(start=start, stop=stop, head_group=head_group, index=index, bytes=staged.nbytes, spans=spans)

    def take(self, turn: int) -> StagedChunks:
        """Hand over a turn's chunks; the slot is used again when they are attended."""
        return self._staged.pop(turn)

    def close(self) -> None:
        """Let go of what was staged; nothing is read any more."""
        self._readers.shutdown()
        self._staged.clear()

    def _lay_out(
        self, slot: torch.Tensor, head_group: int, subproblem: Subproblem, query_chunks: Iterable[int]
    ) -> StagedChunks:
        """Lay out a slot: query inputs chunk by chunk, then each input of all keys."""
        problem = self._plan.problem
        dtype = getattr(torch, problem.dtype)
        row_bytes = problem.head_dim * problem.itemsize
        used = 0

        def take(rows: int) -> torch.Tensor:
            nonlocal used
            used += rows * row_bytes
            return slot[used - rows * row_bytes : used].view(dtype).view(rows, problem.head_dim)

        queries = {}
        for chunk in query_chunks:
            if rows := len(self._plan.tokens(chunk)):
                shape = (problem.group_size, rows, problem.head_dim)
                queries[chunk] = tuple(take(problem.group_size * rows).view(shape) for _ in self._operation.query_inputs)
        key_rows = staged_keys(self._plan, subproblem)
        total = sum(map(len, key_rows.values()))
        keys = tuple(take(total) for _ in self._operation.key_inputs)
        return StagedChunks(head_group, subproblem, queries, keys, key_rows)

    def _reads(self, staged: StagedChunks) -> Iterator[_Read]:
        """The reads that fill a subproblem's slot.

        They are cut to pieces where the array's chunk files are read directly. NaN and Inf are counted in the query
        chunks whose diagonal it owns: so each chunk is counted once in a run.
        """
        group = self._plan.problem.head_group(staged.head_group)
        owned = {block.query_chunk for block in staged.blocks if block.diagonal}
        for chunk, query in staged.queries.items():
            for name, heads in zip(self._operation.query_inputs, query, strict=True):
                for head, rows in zip(group.query_heads, heads, strict=True):
                    yield from self._reads_of_chunk(name, group, head, chunk, rows, chunk in owned)
        for name, tensor in zip(self._operation.key_inputs, staged.keys, strict=True):
            for chunk, rows_of_chunk in staged.key_rows.items():
                rows = tensor[rows_of_chunk.start : rows_of_chunk.stop]
                yield from self._reads_of_chunk(name, group, group.kv_head, chunk, rows, chunk in owned)

    def _reads_of_chunk(
        self, name: str, group: HeadGroup, head: int, chunk: int, rows: torch.Tensor, counted: bool
    ) -> Iterator[_Read]:
        array, tokens = self._dataset.arrays[name], self._plan.tokens(chunk)
        out = as_numpy(rows)
        step = max(1, READ_BYTES // out[:1].nbytes) if array.direct and tokens else max(1, len(tokens))
        for part in pieces(tokens, step):
            into = out[part.start - tokens.start : part.stop - tokens.start]
            yield _Read(array, group.batch, head, chunk, part, into, counted)

    def _read_all(self, reads: Sequence[_Read]) -> Iterable[int]:
        """Carry out reads, those of one slot after those of another where one thread reads; see `_read`."""
        if self._one_reader:  # to hand over each read takes longer than a small one
            return self._readers.submit(lambda: [self._read(read) for read in reads]).result()
        return self._readers.map(self._read, reads)

    def _read(self, read: _Read) -> int:
        """Carry a read out; return how many elements are NaN or Inf, if that is counted."""
        # What is decoded is decoded one read at a time: the plan counts the memory of one.
        with nullcontext() if read.array.direct else self._decoding:
            read.array.read_rows(read.batch, read.head, read.tokens.start, read.tokens.stop, read.out)
        self._step()
        return count_not_finite(read.out) if read.counted else 0


@dataclass(frozen=True)
class _Read:
    array: InputArray
    batch: int
    head: int
    chunk: int
    tokens: range
    out: npt.NDArray[Any]
    counted: bool
