"""Finishing a query chunk: merge its partials, check its ledger, divide and write.

One thread merges partials from disk, others check and divide the chunk before, part by part as its rows are whole, and write
the parts before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from oocattn import clock
from oocattn.errors import TaintedError
from oocattn.kernels.state import AttentionState
from oocattn.operations import Operation
from oocattn.operations.tiles import pieces
from oocattn.pipelines.finished import record_of
from oocattn.pipelines.lane.memory import OutBlock, Pool, as_numpy
from oocattn.pipelines.lane.narrowed import count_narrowed
from oocattn.pipelines.lane.partials.store import MergedChunk, PartialStore
from oocattn.pipelines.watch.events import Merged, Span, Written
from oocattn.plain_threads import plain_threads
from oocattn.planning.plan import Plan
from oocattn.records import to_json
from oocattn.storage.inputs.values import count_not_finite
from oocattn.storage.journal.journal import Journal
from oocattn.storage.results.arrays import ResultArrays, WrittenChunk

Finalise = Callable[[int, int, AttentionState, torch.Tensor, torch.Tensor], None]
"""Divide the state of a head of a head group, in host memory, into out [1, n, Dv] and lse [1, n]."""


@dataclass(frozen=True)
class _DividedChunk:
    """A merged and divided chunk, and its parts on their way to disk."""

    merged: Merged
    not_finite: int
    rows_without_keys: int
    parts: list[Future[_Part]]


@dataclass(frozen=True)
class _Checked:
    """What the ledger of some rows says, over all heads: pairs, and rows without a key."""

    pairs: int
    without_keys: int
    span: Span


@dataclass(frozen=True)
class _Part:
    """A part that was written: its span, bytes, and counts of unusual elements.

    They are the elements of `out` that are NaN or Inf, and those that its dtype made Inf or 0.
    """

    written: WrittenChunk
    span: Span
    not_finite: int
    narrowed: tuple[int, int]


class Finisher:
    """Finishes the chunks of one lane, from `partials`, through `blocks` of `out`.

    Its threads merge, divide and write; torch uses `cores` in each.
    """

    def __init__(
        self,
        plan: Plan,
        operation: Operation,
        partials: PartialStore,
        result: ResultArrays,
        journal: Journal,
        blocks: Pool[OutBlock],
        finalise: Finalise,
        cores: int,
    ) -> None:
        self._plan = plan
        self._operation = operation
        self._partials = partials
        self._result = result
        self._journal = journal
        self._blocks = blocks
        self._finalise = finalise
        threads = {"merge": 1, "check": 1, "divide": 1, "write": plan.buffers.writers(plan.problem)}
        self._collector, self._checker, self._divider, self._writers = (
            plain_threads(count, f"oocattn-{work}", cores) for work, count in threads.items()
        )
        self._chunks: dict[tuple[int, int], Future[_DividedChunk]] = {}

    def begin(self, head_group: int, chunk: int, whole: Iterable[int]) -> None:
        """Begin to finish a chunk whose last partials are in flight.

        `merge` and `write` then find it begun. `whole` waits for the partials: it yields, again and again, up to
        which row they are there. So the chunks of the last subproblem are written part by part while it is computed,
        not together at the end.
        """
        merging = self._collector.submit(self._collect, head_group, chunk)
        self._chunks[head_group, chunk] = self._divider.submit(self._finish, head_group, chunk, merging, whole)

    def merge(self, head_group: int, chunk: int) -> Merged:
        """Merge a chunk's partials, check its rows' ledger, and divide it.

        Raises DamagedPartialError for a partial on disk that is not whole, after which a chunk may be merged again, and
        TaintedError for a wrong ledger.
        """
        if (head_group, chunk) not in self._chunks:
            self.begin(head_group, chunk, [len(self._plan.query_rows(chunk))])
        try:
            return self._chunks[head_group, chunk].result().merged
        except BaseException:
            del self._chunks[head_group, chunk]
            raise

    def write(self, head_group: int, chunk: int) -> Written:
        """Write a merged chunk to `out` and `lse`, file by file; record and release it."""
        finished = self._chunks.pop((head_group, chunk)).result()
        parts = [part.result() for part in finished.parts]
        spans = tuple(part.span for part in parts)
        counts = {
            "pairs": finished.merged.pairs,
            "rows_without_keys": finished.rows_without_keys,
            "not_finite": finished.not_finite,
            "out_not_finite": sum(part.not_finite for part in parts),
            "out_overflowed": sum(part.narrowed[0] for part in parts),
            "out_underflowed": sum(part.narrowed[1] for part in parts),
        }
        record = record_of(counts, [part.written for part in parts])
        self._journal.finish(head_group, chunk, to_json(record))
        self._partials.release(head_group, chunk)
        start, stop = spans[0].start, max(span.stop for span in spans)
        return Written(start=start, stop=stop, head_group=head_group, index=chunk, bytes=record.bytes, spans=spans)

    def close(self) -> None:
        """Wait for all in flight, begin nothing else, and let go of unwritten chunks."""
        for threads in (self._collector, self._divider, self._checker):
            threads.shutdown(cancel_futures=True)
        self._writers.shutdown()
        self._chunks.clear()

    def _collect(self, head_group: int, chunk: int) -> tuple[MergedChunk, Span]:
        start = clock.now()
        return self._partials.collect(head_group, chunk), Span("merge", start, clock.now())

    def _finish(
        self, head_group: int, chunk: int, merging: Future[tuple[MergedChunk, Span]], whole: Iterable[int]
    ) -> _DividedChunk:
        collected, merged = merging.result()
        state = collected.state
        spans, checks, parts = [merged], list[Future[_Checked]](), list[Future[_Part]]()
        first = self._plan.out_rows(chunk).start
        waiting = deque(pieces(range(len(state.keys)), self._plan.out_chunk_rows))
        for row in whole:
            while waiting and waiting[0].stop <= row:
                part = waiting.popleft()
                checks.append(self._checker.submit(self._check_ledger, state, head_group, chunk, part))
                number = (first + part.start) // self._plan.out_chunk_rows
                for head in range(len(self._plan.problem.head_group(head_group).outputs)):
                    rows = state.head(head).rows(part.start, part.stop)
                    parts.append(self._divide(head_group, head, number, rows, spans))
        if waiting:
            raise TaintedError(
                f"head group {head_group}, chunk {chunk}: the rows from {waiting[0].start} on did not come; the result is "
                "discarded, run again"
            )
        checked = [check.result() for check in checks]
        pairs, without_keys = (sum(getattr(check, name) for check in checked) for name in ("pairs", "without_keys"))
        spans += [check.span for check in checked]
        start, stop = merged.start, clock.now()
        event = Merged(start=start, stop=stop, head_group=head_group, index=chunk, pairs=pairs, spans=tuple(spans))
        return _DividedChunk(event, collected.not_finite, without_keys, parts)

    def _check_ledger(self, state: AttentionState, head_group: int, chunk: int, rows: range) -> _Checked:
        """Check the ledger of some rows of a chunk."""
        start = clock.now()
        tokens = self._plan.query_rows(chunk)[rows.start : rows.stop]
        counted = state.rows(rows.start, rows.stop)
        row = self._operation.wrong_row(head_group, counted, tokens)
        if row is not None:
            keys, key_sum = self._operation.expected(head_group, tokens[row])
            found = f"{counted.keys[row]} keys were attended, expected {keys}"
            if counted.keys[row] == keys:
                found = f"other keys were attended than expected (sum of indices {counted.key_sum[row]}, expected {key_sum})"
            raise TaintedError(f"head group {head_group}, query {tokens[row]}: {found}; the result is discarded, run again")
        attended, heads = counted.keys.numpy(), len(state.num)
        without_keys = len(attended) - int(np.count_nonzero(attended))
        return _Checked(int(attended.sum()) * heads, without_keys * heads, Span("merge", start, clock.now()))

    def _divide(self, head_group: int, head: int, part: int, rows: AttentionState, spans: list[Span]) -> Future[_Part]:
        """Finalise the rows of a head in chunk `part` of `out`, and have them written."""
        block = self._blocks.take()
        start = clock.now()
        try:
            out, lse = (memory[:, : len(rows.keys)] for memory in block)
            self._finalise(head_group, head, rows, out, lse)
        except BaseException:
            self._blocks.put(block)  # for what is behind in the queue, or it would wait without end
            raise
        spans.append(Span("merge", start, clock.now()))
        group = self._plan.problem.head_group(head_group)

        def write() -> _Part:
            start = clock.now()
            try:
                not_finite = count_not_finite(as_numpy(out)[0])
                narrowed = count_narrowed(rows, out, lse, not_finite)
                written = self._result.write(group.batch, group.outputs[head], part, as_numpy(out)[0], as_numpy(lse)[0])
            finally:
                self._blocks.put(block)
            return _Part(written, Span("write", start, clock.now()), not_finite, narrowed)

        return self._writers.submit(write)
