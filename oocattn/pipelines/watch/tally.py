"""Adding a run's events up to its report."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

from oocattn import clock
from oocattn.pipelines.finished import NOTHING_FINISHED, Compared, FinishedChunk
from oocattn.pipelines.watch.events import Attended, Event, Merged, Recovered, Saved, Staged, Started, TaskEvent, Written
from oocattn.pipelines.watch.report import RunReport
from oocattn.pipelines.watch.timeline import busy_seconds
from oocattn.planning.plan import Plan
from oocattn.storage.journal.journal import ChunkId

_COUNTED = ("bytes_read", "bytes_partials", "recomputed", "retried", "workers_lost", "out_of_memory")
_OF_CHUNKS = ("pairs", "not_finite", "out_not_finite", "out_overflowed", "out_underflowed")
"""Fields of a report that are counted here, and those that are sums over the records of finished chunks."""


class Tally:
    """A listener that adds a run's events up."""

    def __init__(self) -> None:
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.computing = 0.0
        self.resumed = False
        self.pairs = 0
        self.counts = dict.fromkeys(_COUNTED, 0)

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.resumed = event.resumed
                self._count(recomputed=event.recomputed)
            case Recovered():
                self._count(recomputed=event.recomputed, retried=event.retried, workers_lost=event.workers_lost)
            case Saved():
                self._count(bytes_partials=event.bytes)
            case TaskEvent():
                self._add_task(event)

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self.counts[name] += number

    def _add_task(self, event: TaskEvent) -> None:
        self.computing += busy_seconds(span for span in event.spans if span.resource == "compute")
        bit_by_bit = isinstance(event, Merged | Written)
        self.busy[event.kind] += busy_seconds(event.spans) if bit_by_bit else event.stop - event.start
        if isinstance(event, Staged):
            self._count(bytes_read=event.bytes)
        elif isinstance(event, Attended):
            self.pairs += event.pairs
            written = event.partial_bytes + event.checkpoint_bytes
            self._count(bytes_partials=written, out_of_memory=event.out_of_memory)

    def report(
        self,
        plan: Plan,
        finished: Mapping[ChunkId, FinishedChunk],
        *,
        seconds: float,
        lanes: int,
        compared: Compared = NOTHING_FINISHED,
        other_bits: str = "",
    ) -> RunReport:
        """The figures of a run: the journal has those of all its finished chunks."""
        records = finished.values()
        totals = {name: sum(getattr(record, name) for record in records) for name in _OF_CHUNKS}
        return RunReport(
            **totals,
            **self.counts,
            seconds=seconds,
            predicted_seconds=plan.seconds,
            tokens=plan.problem.tokens * plan.problem.batch,
            subproblems=plan.subproblems,
            lanes=lanes,
            pairs_before=max(0, totals["pairs"] - self.pairs) if self.resumed else 0,
            bytes_written=sum(record.bytes for record in records),
            out_elements=plan.problem.rows * plan.problem.head_dim,
            busy={kind: round(self.busy[kind], 3) for kind in ("staged", "attended", "merged", "written")},
            compute_busy=clock.rate(self.computing, seconds * lanes),
            chunks_before=compared.finished,
            chunks_compared=compared.compared,
            other_bits=other_bits,
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
