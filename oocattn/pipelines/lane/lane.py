"""A lane: one device with its buffers, working through subproblems: stage, attend, merge, write.

All memory of a lane is allocated when it is made and never again; the plan counted it. Which subproblem comes when, and
that no buffer is used for two things at once, is the graph's business. Here is what lanes of every kind share: their
memory and reading, while merging and writing are in `finishing`; how a kind attends is in `cpu_lane` and `cuda_lane`.
"""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from oocattn import clock
from oocattn.division.base import Subproblem
from oocattn.errors import ProblemError
from oocattn.kernels import AttentionState, get_kernel
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.lane.checkpoints import Checkpoints
from oocattn.pipelines.lane.finisher import Finisher, OutBlock
from oocattn.pipelines.lane.memory import Arena, Pool, as_numpy
from oocattn.pipelines.lane.not_finite import count_not_finite
from oocattn.pipelines.lane.partials.disk import DiskPartials, MergeStates
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.memory import MemoryPartials
from oocattn.pipelines.lane.partials.store import PartialStore, States
from oocattn.pipelines.lane.tiles import pieces, staged_keys
from oocattn.pipelines.watch.events import Attended, Merged, Span, Staged, Written
from oocattn.planning.memory import OUT_BLOCKS, STAGING_SLOTS
from oocattn.planning.plan import Plan
from oocattn.problem.problem import HeadGroup
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.readers import InputArray
from oocattn.storage.journal.journal import Journal
from oocattn.storage.results.arrays import ResultArrays

FIRST_STATES = 3
"""States that are allocated after each staging slot, before the next one."""

READ_BYTES = 8 << 20
"""What one thread reads at a time where several read."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to take part in a run: small, and sent once.

    `devices` says where the lane of each worker is, by `Worker.id`: one that is restarted at the same address has another.
    """

    run: str
    plan: Plan
    dataset: Dataset
    result: ResultArrays
    journal: Journal
    scratch: Path
    devices: Mapping[str, str]


@dataclass(frozen=True)
class StagedChunks:
    """One subproblem's chunks in a staging slot: queries [g, n, D] by chunk, keys and values [rows, D] in one piece.

    `not_finite` counts, by query chunk whose diagonal it owns, the elements of the chunk's rows that are NaN or Inf.
    """

    head_group: int
    subproblem: Subproblem
    queries: dict[int, torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    key_rows: dict[int, range]
    not_finite: Counter[int] = field(default_factory=Counter)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.queries.values(), self.key, self.value))


class Lane(ABC):
    """What all kinds of lanes do. Its methods are called from the tasks of one worker, several at a time.

    `readers` is the number of threads that read. Host memory is allocated by the thread of `allocating`, in the order in
    which it is needed: the first chunks are read while the rest is still being pinned.
    """

    def __init__(self, job: Job, readers: int, allocating: Executor) -> None:
        self.plan = plan = job.plan
        self._closing = False
        self.stepped = clock.now()
        """When a piece of a task was last done: a tile, a read, a block to be written, a file of partials."""
        for folder in filter(None, (job.scratch, job.dataset.folder)):
            if not folder.is_dir():
                raise ProblemError(
                    f"no folder {folder} on {socket.gethostname()}: the workers of a run must see the same paths"
                )
        states = {name: States() for name in plan.buffers.states()}
        out_blocks = Pool[OutBlock]()
        self._slots: list[Future[torch.Tensor]] = [Future() for _ in range(STAGING_SLOTS[plan.device])]
        self._allocated = allocating.submit(self._allocate_or_tell, states, out_blocks)
        self.partials = make_partials(
            plan, PartialFiles(job.scratch, job.journal.run, job.journal.claim, self.step), states, self.merge_states
        )
        self.result = job.result
        self.finisher = Finisher(plan, self.partials, self.result, job.journal, out_blocks, self._divide)
        self.kernel = get_kernel(plan.kernel)
        self._dataset = job.dataset
        self._staged: dict[int, StagedChunks] = {}
        self._next_turns = {what: list(range(len(self._slots))) for what in ("stage", "attend")}
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="oocattn-read")
        self._decoding = threading.Lock()
        self._error: BaseException | None = None
        self._checkpoints = Checkpoints(self.partials, plan.checkpoint_seconds if plan.saves else 0.0, self._fail)

    def _allocate_or_tell(self, states: Mapping[str, States], out_blocks: Pool[OutBlock]) -> None:
        """Allocate everything; where that fails, whoever waits for what is missing is told why."""
        try:
            with naming(SET_UP):
                self._allocate_all(states, out_blocks)
        except BaseException as error:
            for slot in self._slots:
                if not slot.done():
                    slot.set_exception(error)
            for kind in states.values():
                kind.fail(error)
            out_blocks.fail(error)

    def _allocate_all(self, states: Mapping[str, States], out_blocks: Pool[OutBlock]) -> None:
        """Allocate what the plan counted: first one slot and a few states, so that work begins, then the rest in turn."""
        problem, buffers = self.plan.problem, self.plan.buffers
        head_dim, group_size = problem.head_dim, problem.group_size

        def allocate(nbytes: int) -> torch.Tensor:
            if self._closing:
                raise RuntimeError("the lane is closed before it was set up")
            return self.allocate(nbytes)

        def add_state(name: str, rows: int) -> None:
            memory = Arena(allocate(buffers.state_bytes(problem, rows)))
            states[name].put(memory.partial(group_size, rows, head_dim))

        waiting = deque((name, rows) for name, (count, rows) in buffers.states().items() for _ in range(count))
        for slot in self._slots:
            slot.set_result(allocate(self.plan.slot_bytes))
            for _ in range(min(FIRST_STATES, len(waiting))):
                add_state(*waiting.pop())  # blocks and buffers before accumulators
        for _ in range(OUT_BLOCKS[self.plan.device]):
            memory = Arena(allocate(buffers.out_bytes(problem)))
            # At the beginning of a page, where memory is pinned: so it can be written to disk directly.
            out = memory.take((1, self.plan.out_chunk_rows, head_dim), getattr(torch, problem.out_dtype))
            out_blocks.put((out, memory.take((1, self.plan.out_chunk_rows), torch.float32)))
        while waiting:
            add_state(*waiting.pop())

    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes of host memory, as uint8 [nbytes] or more, that this kind of lane can work with."""

    def attend(self, turn: int) -> Attended:
        """Compute the partials of the subproblem that was staged for this turn, and hand them to the partial store.

        A lane takes subproblems in the order of their turns, whichever task comes first: that which comes early begins
        those before it too, which have been staged. The event also tells of the checkpoints that were made meanwhile.
        Raises RuntimeError for a turn that was taken before.
        """
        self._take_turn("attend", turn)
        return self._checkpoints.tell(self.compute(turn))

    @abstractmethod
    def compute(self, turn: int) -> Attended:
        """`attend`, on this kind of device."""

    def save(self) -> int:
        """Have on disk what is in memory alone, if the plan says so, as nothing more will come; return the bytes written."""
        self._checkpoints.close()
        return self.partials.save(patient=False) if self.plan.saves else 0

    @abstractmethod
    def merge_states(self, into: AttentionState, partial: AttentionState) -> None:
        """Merge one state in host memory into another; when this returns, `partial` may be overwritten."""

    def step(self) -> None:
        """A piece of a task is done, so the lane works, however long the task takes."""
        self.stepped = clock.now()

    def _divide(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.finalise(state, out, lse)
        self.step()

    @abstractmethod
    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide the state of one head, in host memory, into out [1, n, D] and lse [1, n]."""

    def close(self) -> None:
        """Give back what the lane holds; nothing runs on it any more."""
        self._closing = True
        self._checkpoints.close()
        wait([self._allocated])
        self._readers.shutdown()
        self.finisher.close()
        # They know the lane: its memory would stay until Python looks for such circles.
        del self.finisher, self.partials, self._checkpoints

    def stage(self, turn: int, head_group: int, index: int, wanted: Collection[int] | None = None) -> Staged:
        """Read the chunks of a subproblem into a staging slot; `turn` counts the subproblems of this lane from 0.

        Of its query chunks only those that are `wanted` are attended (default: all): the others' partials are there. Raises
        RuntimeError for a turn that was taken before.
        """
        self._take_turn("stage", turn)
        start = clock.now()
        slot = self._slots[turn % len(self._slots)].result()
        subproblem = self.plan.division.subproblem(index)
        chunks = [chunk for chunk in subproblem.query_chunks if wanted is None or chunk in wanted]
        self._staged[turn] = staged = self._carve(slot, head_group, subproblem, chunks)
        reads = list(self._reads(staged))
        for read, not_finite in zip(reads, self._readers.map(self._read, reads), strict=True):
            staged.not_finite[read.chunk] += not_finite
        stop = clock.now()
        spans = (Span("read", start, stop),)
        return Staged(start=start, stop=stop, head_group=head_group, index=index, bytes=staged.nbytes, spans=spans)

    def _take_turn(self, what: str, turn: int) -> None:
        """See to it that nothing is done twice: a slot's turns come one after another, each once.

        Dask runs a task again whose result is not there any more, where another worker dies with what was made of it. To
        stage it again would put other chunks under a subproblem that is being attended.
        """
        turns, slot = self._next_turns[what], turn % len(self._slots)
        if turn != turns[slot]:
            raise RuntimeError(f"asked to {what} turn {turn} where {turns[slot]} is next")
        turns[slot] += len(self._slots)

    def _read(self, read: _Read) -> int:
        """Carry a read out; return how many elements are NaN or Inf, if that is counted."""
        # What is decoded is decoded one read at a time: the plan counts the memory of one.
        with nullcontext() if read.array.direct else self._decoding:
            read.array.read_rows(read.batch, read.head, read.tokens.start, read.tokens.stop, read.out)
        self.step()
        return count_not_finite(read.out) if read.counted else 0

    def _reads(self, staged: StagedChunks) -> Iterator[_Read]:
        """The reads that fill a staged subproblem, cut to pieces where the array's chunk files are read directly.

        NaN and Inf are counted in the query chunks whose diagonal it owns: so each chunk is counted once in a run.
        """
        group = self.plan.problem.head_group(staged.head_group)
        owned = {block.query_chunk for block in staged.subproblem.blocks if block.diagonal} & staged.queries.keys()
        for chunk, query in staged.queries.items():
            for head, rows in zip(group.query_heads, query, strict=True):
                yield from self._reads_of("q", group, head, chunk, rows, chunk in owned)
        for name, tensor in (("k", staged.key), ("v", staged.value)):
            for chunk, rows_of_chunk in staged.key_rows.items():
                rows = tensor[rows_of_chunk.start : rows_of_chunk.stop]
                yield from self._reads_of(name, group, group.kv_head, chunk, rows, chunk in owned)

    def _reads_of(
        self, name: str, group: HeadGroup, head: int, chunk: int, rows: torch.Tensor, counted: bool
    ) -> Iterator[_Read]:
        array, tokens = self._dataset.arrays[name], self.plan.tokens(chunk)
        out = as_numpy(rows)
        step = max(1, READ_BYTES // out[:1].nbytes) if array.direct and tokens else max(1, len(tokens))
        for part in pieces(tokens, step):
            into = out[part.start - tokens.start : part.stop - tokens.start]
            yield _Read(array, group.batch, head, chunk, part, into, counted)

    @contextmanager
    def telling_the_first_error(self) -> Iterator[None]:
        """What stops a lane is told by every task that comes after: they would only trip over what it left behind."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except BaseException as error:
            first = self._fail(error)
            if first is error:
                raise
            raise first from None

    def _fail(self, error: BaseException) -> BaseException:
        """Have every further task tell of this, or of what went wrong before; return which."""
        if self._error is None:
            self._error = error
        return self._error

    def merge(self, head_group: int, chunk: int) -> Merged:
        """See `Finisher.merge`."""
        return self.finisher.merge(head_group, chunk)

    def write(self, head_group: int, chunk: int) -> Written:
        """See `Finisher.write`."""
        return self.finisher.write(head_group, chunk)

    def _carve(
        self, slot: torch.Tensor, head_group: int, subproblem: Subproblem, query_chunks: Iterable[int]
    ) -> StagedChunks:
        """Lay a subproblem's chunks out in a slot: the queries of each chunk, then all keys, then all values."""
        problem = self.plan.problem
        dtype = getattr(torch, problem.dtype)
        row_bytes = problem.head_dim * problem.itemsize
        used = 0

        def take(rows: int) -> torch.Tensor:
            nonlocal used
            used += rows * row_bytes
            return slot[used - rows * row_bytes : used].view(dtype).view(rows, problem.head_dim)

        queries = {}
        for chunk in query_chunks:
            rows = len(self.plan.tokens(chunk))
            if rows:
                queries[chunk] = take(problem.group_size * rows).view(problem.group_size, rows, problem.head_dim)
        key_rows = staged_keys(self.plan, subproblem)
        total = sum(map(len, key_rows.values()))
        return StagedChunks(head_group, subproblem, queries, take(total), take(total), key_rows)


def make_partials(plan: Plan, files: PartialFiles, states: Mapping[str, States], merge_states: MergeStates) -> PartialStore:
    """The store that the plan names, working with the states that `memory.Buffers` counts by these names."""
    if plan.partials == "memory":
        return MemoryPartials(plan, files, states["accumulators"])
    return DiskPartials(plan, files, states["accumulators"], states["buffers"], states["blocks"], merge_states)


@dataclass(frozen=True)
class _Read:
    array: InputArray
    batch: int
    head: int
    chunk: int
    tokens: range
    out: npt.NDArray[Any]
    counted: bool
