"""A lane: one device with its buffers, working through subproblems: stage, attend, merge, write.

All memory of a lane is allocated when it is made and never again; the plan counted it. Which subproblem comes when, and
that no buffer is used for two things at once, is the graph's business. Here is what lanes of every kind share, reading,
merging and writing; how a kind attends is in `cpu_lane` and `cuda_lane`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from oocattn.errors import IntegrityError
from oocattn.kernels import Partial, get_kernel
from oocattn.memory import STAGING_SLOTS
from oocattn.pipelines.arena import Arena
from oocattn.pipelines.events import Event, Span
from oocattn.pipelines.partials import make_partials
from oocattn.pipelines.tiles import pieces
from oocattn.plans import Plan
from oocattn.problem import HeadGroup
from oocattn.quorum import Subproblem
from oocattn.storage.dataset import Dataset
from oocattn.storage.readers import InputArray
from oocattn.storage.result import ResultArrays

READ_BYTES = 8 << 20
"""What one thread reads at a time where several read."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to take part in a run: small, and sent once. `devices` says where each worker's lane is."""

    run: str
    plan: Plan
    dataset: str
    result: Path
    scratch: Path
    devices: Mapping[str, str]


@dataclass(frozen=True)
class Staged:
    """One subproblem's chunks in a staging slot: queries [g, n, D] by chunk, keys and values [rows, D] in one piece."""

    head_group: int
    subproblem: Subproblem
    queries: dict[int, torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    key_rows: dict[int, range]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.queries.values(), self.key, self.value))


class Lane(ABC):
    """What all kinds of lanes do. Its methods are called from the tasks of one worker, several at a time.

    `memory` is the host memory that the lane may use, `fold` merges one host state into another, and `readers` is the
    number of threads that read.
    """

    def __init__(self, job: Job, memory: Arena, readers: int) -> None:
        self.plan = plan = job.plan
        problem = plan.problem
        self.dataset = Dataset.open(job.dataset)
        self.result = ResultArrays.open(job.result, writable=True)
        self.kernel = get_kernel(plan.kernel)
        self._slots = [memory.take((plan.slot_bytes,), torch.uint8) for _ in range(STAGING_SLOTS[plan.device])]
        self._staged: dict[int, Staged] = {}
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="oocattn-read")

        def allocate(rows: int) -> Partial:
            return memory.partial(problem.group_size, rows, problem.head_dim)

        self.partials = make_partials(plan, job.scratch, allocate, self.fold)
        self._merged: dict[tuple[int, int], Partial] = {}
        self._out = memory.take((1, plan.out_chunk_rows, problem.head_dim), getattr(torch, problem.out_dtype))
        self._lse = memory.take((1, plan.out_chunk_rows), torch.float32)
        self._merging, self._writing = threading.Lock(), threading.Lock()

    @abstractmethod
    def attend(self, turn: int) -> Event:
        """Compute the partials of the subproblem that was staged for this turn, and hand them to the partial store.

        A lane takes subproblems in the order of their turns, whichever task comes first: that which comes early begins
        those before it too, which have been staged.
        """

    @abstractmethod
    def fold(self, into: Partial, partial: Partial) -> None:
        """Merge one state in host memory into another; when this returns, `partial` may be overwritten."""

    @abstractmethod
    def finalise(self, state: Partial, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide the state of one head, in host memory, into out [1, n, D] and lse [1, n]."""

    def close(self) -> None:
        """Give back what the lane holds; nothing runs on it any more."""
        self._readers.shutdown()

    def stage(self, turn: int, head_group: int, index: int) -> Event:
        """Read the chunks of a subproblem into a staging slot; `turn` counts the subproblems of this lane from 0."""
        start = time.time()
        slot = self._slots[turn % len(self._slots)]
        self._staged[turn] = staged = self._carve(slot, head_group, self.plan.division.subproblem(index))
        not_finite = sum(self._readers.map(_read, self._reads(staged)))
        detail = {"not_finite": not_finite}
        stop = time.time()
        spans = (Span("read", start, stop),)
        return Event("staged", start, stop, head_group, index, amount=staged.nbytes, detail=detail, spans=spans)

    def _reads(self, staged: Staged) -> Iterator[_Read]:
        """The reads that fill a staged subproblem, cut to pieces where the array's chunk files are read directly.

        NaN and Inf are counted in the chunks whose diagonal it owns: so each chunk is counted once in a run.
        """
        group = self.plan.problem.head_group(staged.head_group)
        owned = {block.query_chunk for block in staged.subproblem.blocks if block.diagonal}
        for chunk, query in staged.queries.items():
            for head, rows in zip(group.query_heads, query, strict=True):
                yield from self._reads_of("q", group, head, self.plan.tokens(chunk), rows, chunk in owned)
        for name, tensor in (("k", staged.key), ("v", staged.value)):
            for chunk, rows_of_chunk in staged.key_rows.items():
                rows = tensor[rows_of_chunk.start : rows_of_chunk.stop]
                yield from self._reads_of(name, group, group.kv_head, self.plan.tokens(chunk), rows, chunk in owned)

    def _reads_of(
        self, name: str, group: HeadGroup, head: int, tokens: range, rows: torch.Tensor, counted: bool
    ) -> Iterator[_Read]:
        array = self.dataset.arrays[name]
        out = as_numpy(rows)
        step = max(1, READ_BYTES // out[:1].nbytes) if array.direct and tokens else max(1, len(tokens))
        for part in pieces(tokens, step):
            into = out[part.start - tokens.start : part.stop - tokens.start]
            yield _Read(array, group.batch, head, part, into, counted)

    def merge(self, head_group: int, chunk: int) -> Event:
        """Merge the partials of a query chunk and check its ledger: every row attended exactly the keys it must."""
        with self._merging:
            start = time.time()
            state = self.partials.collect(head_group, chunk)
            self._check_ledger(state, head_group, self.plan.tokens(chunk))
        self._merged[head_group, chunk] = state
        pairs = int(state.keys.numpy().sum()) * self.plan.problem.group_size
        stop = time.time()
        spans = (Span("merge", start, stop),)
        return Event("merged", start, stop, head_group, chunk, amount=pairs, spans=spans)

    def _check_ledger(self, state: Partial, head_group: int, tokens: range) -> None:
        attended = state.keys.numpy()
        expected = np.full_like(attended, self.plan.problem.tokens)
        if self.plan.problem.causal:
            expected = np.arange(tokens.start + 1, tokens.stop + 1)
        wrong = np.flatnonzero(attended != expected)
        if len(wrong):
            row = int(wrong[0])
            raise IntegrityError(
                f"head group {head_group}, token {tokens[row]}: {attended[row]} keys were attended, expected "
                f"{expected[row]}; the chunk is not written, run again"
            )

    def write(self, head_group: int, chunk: int) -> Event:
        """Finalise a merged query chunk into `out` and `lse`, one chunk file at a time, and release its partials."""
        state = self._merged.pop((head_group, chunk))
        group = self.plan.problem.head_group(head_group)
        tokens, step = self.plan.tokens(chunk), self.plan.out_chunk_rows
        amount = 0
        with self._writing:
            start = time.time()
            for local, head in enumerate(group.query_heads):
                for first in range(0, len(tokens), step):
                    rows = state.head(local).rows(first, min(first + step, len(tokens)))
                    out, lse = self._out[:, : len(rows.keys)], self._lse[:, : len(rows.keys)]
                    self.finalise(rows, out, lse)
                    part = (tokens.start + first) // step
                    amount += self.result.write(group.batch, head, part, as_numpy(out)[0], as_numpy(lse)[0])
        self.partials.release(head_group, chunk)
        stop = time.time()
        spans = (Span("write", start, stop),)
        return Event("written", start, stop, head_group, chunk, amount=amount, spans=spans)

    def _carve(self, slot: torch.Tensor, head_group: int, subproblem: Subproblem) -> Staged:
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
        for chunk in subproblem.query_chunks:
            rows = len(self.plan.tokens(chunk))
            if rows:
                queries[chunk] = take(problem.group_size * rows).view(problem.group_size, rows, problem.head_dim)
        key_rows, total = {}, 0
        for chunk in subproblem.key_chunks:
            rows = len(self.plan.tokens(chunk))
            key_rows[chunk] = range(total, total + rows)
            total += rows
        return Staged(head_group, subproblem, queries, take(total), take(total), key_rows)


@dataclass(frozen=True)
class _Read:
    array: InputArray
    batch: int
    head: int
    tokens: range
    out: npt.NDArray[Any]
    counted: bool


def _read(read: _Read) -> int:
    """Carry a read out; return how many elements are NaN or Inf, if that is counted."""
    read.array.read_rows(read.batch, read.head, read.tokens.start, read.tokens.stop, read.out)
    return count_not_finite(read.out) if read.counted else 0


def count_not_finite(array: npt.NDArray[Any]) -> int:
    """How many elements are NaN or Inf: those whose exponent bits are all ones."""
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[array.dtype.name]
    bits = array.reshape(-1).view(np.uint16 if array.itemsize == 2 else np.uint32)
    mask = bits.dtype.type(exponent)  # in blocks, so that temporaries stay small
    return sum(int(np.count_nonzero((part & mask) == mask)) for part in np.split(bits, range(1 << 18, len(bits), 1 << 18)))


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as a numpy array, bfloat16 as that of ml_dtypes; no copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
