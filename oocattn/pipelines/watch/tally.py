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


class Tally:
    """A listener that adds a run's events up."""

    def __init__(self) -> None:
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.computing = 0.0
        self.resumed = False
        self.pairs = self.bytes_read = self.bytes_partials = 0
        self.recomputed = self.retried = self.workers_lost = self.out_of_memory = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.resumed = event.resumed
                self.recomputed += event.recomputed
            case Recovered():
                self.recomputed += event.recomputed
                self.retried += event.retried
                self.workers_lost += event.workers_lost
            case Saved():
                self.bytes_partials += event.bytes
            case TaskEvent():
                self._add_task(event)

    def _add_task(self, event: TaskEvent) -> None:
        self.computing += busy_seconds(span for span in event.spans if span.resource == "compute")
        bit_by_bit = isinstance(event, Merged | Written)
        self.busy[event.kind] += busy_seconds(event.spans) if bit_by_bit else event.stop - event.start
        if isinstance(event, Staged):
            self.bytes_read += event.bytes
        elif isinstance(event, Attended):
            self.pairs += event.pairs
            self.bytes_partials += event.partial_bytes + event.checkpoint_bytes
            self.out_of_memory += event.out_of_memory

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

        def total(name: str) -> int:
            return sum(getattr(record, name) for record in finished.values())

        return RunReport(
            seconds=seconds,
            predicted_seconds=plan.seconds,
            tokens=plan.problem.tokens * plan.problem.batch,
            subproblems=plan.subproblems,
            lanes=lanes,
            pairs=total("pairs"),
            pairs_before=max(0, total("pairs") - self.pairs) if self.resumed else 0,
            bytes_read=self.bytes_read,
            bytes_partials=self.bytes_partials,
            bytes_written=total("bytes"),
            not_finite=total("not_finite"),
            out_not_finite=total("out_not_finite"),
            out_overflowed=total("out_overflowed"),
            out_underflowed=total("out_underflowed"),
            out_elements=plan.problem.rows * plan.problem.head_dim,
            recomputed=self.recomputed,
            retried=self.retried,
            workers_lost=self.workers_lost,
            busy={kind: round(self.busy[kind], 3) for kind in ("staged", "attended", "merged", "written")},
            compute_busy=clock.rate(self.computing, seconds * lanes),
            out_of_memory=self.out_of_memory,
            chunks_before=compared.finished,
            chunks_compared=compared.compared,
            other_bits=other_bits,
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
