"""A lane: one device with its buffers, working through subproblems: stage, attend, merge, write.

All memory of a lane is allocated when it is made and never again; the plan counted it. Which subproblem comes when, and
that no buffer is used for two things at once, is the graph's business.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from oocattn.errors import IntegrityError
from oocattn.kernels import Partial, finalise, get_kernel
from oocattn.pipelines.events import Event
from oocattn.pipelines.partials import make_partials
from oocattn.planner import STAGING_SLOTS
from oocattn.plans import Plan
from oocattn.quorum import Block, Subproblem
from oocattn.storage.dataset import Dataset
from oocattn.storage.result import ResultArrays


@dataclass(frozen=True)
class Job:
    """All that a worker needs to take part in a run: small, and sent once."""

    run: str
    plan: Plan
    dataset: str
    result: Path
    scratch: Path


@dataclass(frozen=True)
class Staged:
    """One subproblem's chunks in a staging slot: queries [g, n, D] by chunk, keys and values [rows, D] in one piece."""

    head_group: int
    subproblem: Subproblem
    queries: dict[int, torch.Tensor]
    key: torch.Tensor
    value: torch.Tensor
    key_rows: dict[int, range]


class Lane:
    """The CPU lane. Its methods are called from the tasks of one worker, several at a time on different buffers."""

    def __init__(self, job: Job) -> None:
        plan = job.plan
        self.plan = plan
        self.dataset = Dataset.open(job.dataset)
        self.result = ResultArrays.open(job.result, writable=True)
        self.kernel = get_kernel(plan.kernel)
        self.partials = make_partials(plan, job.scratch)
        self._slots = [torch.empty(plan.slot_bytes, dtype=torch.uint8) for _ in range(STAGING_SLOTS)]
        self._staged: dict[int, Staged] = {}
        problem = plan.problem
        self._partial = Partial.empty(problem.group_size, plan.chunk_rows, problem.head_dim)
        self._merged: dict[tuple[int, int], Partial] = {}
        self._out = torch.empty(1, plan.out_chunk_rows, problem.head_dim, dtype=getattr(torch, problem.out_dtype))
        self._lse = torch.empty(1, plan.out_chunk_rows, dtype=torch.float32)
        self._writing = threading.Lock()

    def stage(self, slot: int, head_group: int, index: int) -> Event:
        """Read the chunks of a subproblem into a staging slot."""
        start = time.time()
        self._staged[slot] = staged = self._carve(slot, head_group, self.plan.division.subproblem(index))
        group = self.plan.problem.head_group(head_group)
        for chunk, query in staged.queries.items():
            tokens = self.plan.tokens(chunk)
            for head, rows in zip(group.query_heads, query, strict=True):
                self.dataset.arrays["q"].read_rows(group.batch, head, tokens.start, tokens.stop, as_numpy(rows))
        for name, tensor in (("k", staged.key), ("v", staged.value)):
            for chunk, rows_of_chunk in staged.key_rows.items():
                tokens = self.plan.tokens(chunk)
                if not tokens:
                    continue
                rows = tensor[rows_of_chunk.start : rows_of_chunk.stop]
                self.dataset.arrays[name].read_rows(group.batch, group.kv_head, tokens.start, tokens.stop, as_numpy(rows))
        amount = sum(tensor.nbytes for tensor in (*staged.queries.values(), staged.key, staged.value))
        detail = {"not_finite": self._not_finite(staged)}
        return Event("staged", start, time.time(), head_group, index, amount=amount, detail=detail)

    def _not_finite(self, staged: Staged) -> int:
        """NaN and Inf in the chunks whose diagonal this subproblem owns: so each chunk is counted once in a run."""
        count = 0
        for block in staged.subproblem.blocks:
            if block.diagonal and block.query_chunk in staged.queries:
                rows = staged.key_rows[block.query_chunk]
                count += count_not_finite(staged.queries[block.query_chunk])
                count += count_not_finite(staged.key[rows.start : rows.stop])
                count += count_not_finite(staged.value[rows.start : rows.stop])
        return count

    def attend(self, slot: int) -> Event:
        """Compute the partials of the staged subproblem and hand them to the partial store."""
        start = time.time()
        if torch.get_num_threads() != self.plan.threads:
            torch.set_num_threads(self.plan.threads)
        staged = self._staged.pop(slot)
        pairs = committed = 0
        for block in staged.subproblem.blocks:
            if block.query_chunk not in staged.queries:
                continue  # beyond the last token
            query = staged.queries[block.query_chunk]
            state = self._partial.rows(0, query.shape[1])
            state.reset()
            self._attend_block(staged, block, query, state)
            pairs += int(state.keys.sum()) * len(query)
            committed += self.partials.add(staged.head_group, block.query_chunk, staged.subproblem.index, state)
        detail = {"partial_bytes": committed}
        return Event("attended", start, time.time(), staged.head_group, staged.subproblem.index, amount=pairs, detail=detail)

    def _attend_block(self, staged: Staged, block: Block, query: torch.Tensor, state: Partial) -> None:
        """One query chunk: plain rectangles over contiguous runs of staged keys, and a triangle for a causal diagonal."""
        problem = self.plan.problem
        chunks = block.key_chunks
        if block.diagonal and not problem.causal:
            chunks = tuple(sorted((*chunks, block.query_chunk)))
        for run in contiguous_runs([staged.key_rows[chunk] for chunk in chunks]):
            key, value = staged.key[run.start : run.stop], staged.value[run.start : run.stop]
            self.kernel.attend(query, key, value, state, scale=problem.scale, diagonal=False)
        if block.diagonal and problem.causal:
            rows = staged.key_rows[block.query_chunk]
            key, value = staged.key[rows.start : rows.stop], staged.value[rows.start : rows.stop]
            self.kernel.attend(query, key, value, state, scale=problem.scale, diagonal=True)

    def merge(self, head_group: int, chunk: int) -> Event:
        """Merge the partials of a query chunk and check its ledger: every row attended exactly the keys it must."""
        start = time.time()
        state = self.partials.collect(head_group, chunk)
        self._check_ledger(state, head_group, self.plan.tokens(chunk))
        self._merged[head_group, chunk] = state
        pairs = int(state.keys.sum()) * self.plan.problem.group_size
        return Event("merged", start, time.time(), head_group, chunk, amount=pairs)

    def _check_ledger(self, state: Partial, head_group: int, tokens: range) -> None:
        problem = self.plan.problem
        expected = torch.full_like(state.keys, problem.tokens)
        if problem.causal:
            expected = torch.arange(tokens.start + 1, tokens.stop + 1)
        wrong = torch.nonzero(state.keys != expected)
        if len(wrong):
            row = int(wrong[0, 0])
            raise IntegrityError(
                f"head group {head_group}, token {tokens[row]}: {int(state.keys[row])} keys were attended, expected "
                f"{int(expected[row])}; the chunk is not written, run again"
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
                    finalise(rows, out, lse)
                    part = (tokens.start + first) // step
                    amount += self.result.write(group.batch, head, part, as_numpy(out)[0], as_numpy(lse)[0])
        self.partials.release(head_group, chunk)
        return Event("written", start, time.time(), head_group, chunk, amount=amount)

    def _carve(self, slot: int, head_group: int, subproblem: Subproblem) -> Staged:
        """Lay a subproblem's chunks out in a slot: the queries of each chunk, then all keys, then all values."""
        problem = self.plan.problem
        dtype = getattr(torch, problem.dtype)
        row_bytes = problem.head_dim * problem.itemsize
        used = 0

        def take(rows: int) -> torch.Tensor:
            nonlocal used
            used += rows * row_bytes
            return self._slots[slot][used - rows * row_bytes : used].view(dtype).view(rows, problem.head_dim)

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


def contiguous_runs(ranges: Iterable[range]) -> list[range]:
    """Join ascending ranges where one starts at the end of the one before: [0-2), [2-5), [7-9) -> [0-5), [7-9)."""
    runs: list[range] = []
    for rows in ranges:
        if runs and runs[-1].stop == rows.start:
            runs[-1] = range(runs[-1].start, rows.stop)
        else:
            runs.append(rows)
    return [run for run in runs if run]


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as a numpy array, bfloat16 as that of ml_dtypes; no copy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many elements are NaN or Inf. The sum of a block tells at the speed of memory that there are none."""
    blocks = tensor.reshape(-1).split(1 << 18)
    suspects = (block for block in blocks if not math.isfinite(float(block.sum(dtype=torch.float32))))
    return sum(int((~torch.isfinite(block)).sum()) for block in suspects)
