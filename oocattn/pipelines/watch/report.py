"""The report of a run: its figures, kept beside its result, and the listener that adds them up."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from oocattn import clock
from oocattn.errors import IntegrityError, ProblemError
from oocattn.naming import setting
from oocattn.pipelines.finished import NOTHING_FINISHED, Compared, FinishedChunk
from oocattn.pipelines.watch.events import (
    Attended,
    Event,
    Merged,
    Recovered,
    Saved,
    Staged,
    Started,
    TaskEvent,
    Written,
    name_process,
)
from oocattn.pipelines.watch.timeline import busy_seconds
from oocattn.planning.plan import Plan
from oocattn.planning.timing import CoreClock
from oocattn.problem.arrays import KEY_BIAS, ArrayName
from oocattn.records import ADDED, UNRECORDED, Count, Positive, Range, Seconds, document, from_json
from oocattn.shown import Shown, named_lines
from oocattn.storage.journal.journal import ChunkId
from oocattn.storage.paths import REPORT, ResultPaths
from oocattn.text import printable
from oocattn.units import format_bytes, format_count, format_seconds

FORMAT = 1
"""Of the JSON document."""

MOST_BYTES = 1 << 20  # of the file

MOST_UNDERFLOWED = 0.01  # share of underflowed elements of `out` that makes the others inaccurate too

NOTICED_WAITING = 0.05  # share of a run for which it waited for cores

logger = logging.getLogger("oocattn")

_FOLLOWS = ("rate",)

NO_KEYS = "their out is 0 and their lse -inf, or that of the learnable sink"


@dataclass(frozen=True, repr=False)
class RunReport(Shown):
    """Figures of one finished run.

    `seconds` is wall time from the first task to the committed result, of the process that finished it, as are `busy`,
    the seconds spent in each kind of task, over all lanes, `bytes_read`, `bytes_partials` (written to disk) and
    `compute_busy`, the share of the wall time that a lane's compute stream (on a CPU: its kernel) was busy, their mean.
    `pairs` are the query-key pairs that the ledger confirmed, `pairs_before` those attended before the run was resumed;
    `not_finite` the NaN and Inf found in the inputs (of key_bias NaN and +Inf, for -Inf leaves a key out), `not_finite_in`
    the arrays in which that process found any, `out_not_finite` those in `out`, `out_overflowed` those of them that
    only its dtype made Inf, `out_underflowed` the elements that it made 0, of `out_elements`; `rows_without_keys` the rows
    that attend no key, over all heads (0, 0, 1 and 0 in reports of older versions);
    `recomputed` the partials that were damaged on disk; `retried` the tasks that failed and were tried again,
    `workers_lost` how often workers died; `out_of_memory` how often the run continued with smaller tiles on a GPU;
    `chunks_before` the chunks that were finished before it was resumed, `chunks_compared` those of them whose checksums
    were compared then; `other_bits` what has computed otherwise than when the run began, so that bits differ;
    `waited` the part of `seconds` for which a run on a CPU waited for cores that other processes had (0 where its lanes are
    in other processes than its driver). `place` is where its result is, None where no result has it yet.
    """

    seconds: Seconds
    predicted_seconds: Seconds
    tokens: Positive
    subproblems: Count
    lanes: Positive
    pairs: Count
    pairs_before: Count
    bytes_read: Count
    bytes_partials: Count
    bytes_written: Count
    not_finite: Count
    out_not_finite: Count
    recomputed: Count
    retried: Count
    workers_lost: Count
    busy: Mapping[str, Seconds]
    compute_busy: Annotated[float, Range(0.0, 1e6)]
    out_of_memory: Count
    chunks_before: Count
    chunks_compared: Count
    other_bits: str
    finished: str
    out_overflowed: Annotated[Count, ADDED] = 0
    out_underflowed: Annotated[Count, ADDED] = 0
    out_elements: Annotated[Positive, ADDED] = 1
    rows_without_keys: Annotated[Count, ADDED] = 0
    not_finite_in: Annotated[tuple[ArrayName, ...], ADDED] = ()
    waited: Annotated[Seconds, ADDED] = 0.0
    place: Annotated[ResultPaths | None, UNRECORDED] = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, with the rate that follows from its fields (docs/scripts.md)."""
        return document(FORMAT, self, *_FOLLOWS)

    def to_html(self, path: str | Path) -> Path:
        """Write the page of `oocattn.report`, on all that is known of the run, as a file; return its path.

        Raises ProblemError for the report of an event, whose result is not there yet, and as `FullReport.to_html`.
        """
        from oocattn.pipelines.watch.full_report import full_report

        if self.place is None:
            raise ProblemError("this report does not know its result: expected that of a Result; use oocattn.report(RESULT)")
        return full_report(self.place).to_html(path)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunReport:
        """The report that `to_json` wrote, here or in an older version. Raises IntegrityError for anything else."""
        try:
            if content.get("format", FORMAT) != FORMAT:
                raise ValueError(f"its format is {content['format']!r:.80}, expected {FORMAT}")
            return from_json(cls, {name: value for name, value in content.items() if name not in ("format", *_FOLLOWS)})
        except ValueError as error:
            raise IntegrityError(f"not the report of a run: {error}") from None

    @property
    def lost(self) -> list[str]:
        """Lines on what numbers of a limited range have lost of `out`."""
        lines = []
        if self.out_overflowed:
            lines.append(
                f"{self.out_overflowed:,} elements of out are Inf because their values are too large for its dtype: "
                f"choose a wider one, {setting('dtype', 'float32')}"
            )
        elif self.out_not_finite and not self.not_finite:
            lines.append(
                f"{self.out_not_finite:,} elements of out are NaN or Inf, and none of the inputs: float32 arithmetic "
                "overflowed; make scores or values smaller"
            )
        if self.out_underflowed > self.out_elements * MOST_UNDERFLOWED:
            lines.append(
                f"{self.out_underflowed:,} elements of out are 0 because their values are too small for its dtype: "
                f"choose a wider one, {setting('dtype', 'float32')}, or make values larger"
            )
        return lines

    @property
    def rate(self) -> float:
        """Tokens/s of the work done since the run was started or resumed."""
        return clock.rate(self.tokens * (1 - self.pairs_before / max(1, self.pairs)), self.seconds)

    def _line(self) -> str:
        took = f"{format_seconds(self.seconds)} (predicted {format_seconds(self.predicted_seconds)})"
        return f"{self.tokens:,} tokens in {took}, {self.rate:,.0f} tokens/s"

    def _table(self) -> list[tuple[str, str]]:
        return named_lines(str(self))

    def __str__(self) -> str:
        since = " since it was resumed" if self.pairs_before else ""
        lines = [
            f"finished     {self.finished} in {format_seconds(self.seconds)}{since} "
            f"(predicted {format_seconds(self.predicted_seconds)}), {self.rate:,.0f} tokens/s",
            f"work         {self.subproblems:,} subproblem{'s' * (self.subproblems != 1)} on {self.lanes} "
            f"lane{'s' * (self.lanes > 1)}, "
            f"{format_count(self.pairs)}pairs, every one counted",
            f"bytes        {format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_partials)} of partials{since}, "
            f"{format_bytes(self.bytes_written)} written in all",
            "busy         " + ", ".join(f"{kind} {format_seconds(seconds)}" for kind, seconds in self.busy.items()),
            f"compute      busy {self.compute_busy:.1%} of the time",
        ]
        if self.waited > NOTICED_WAITING * self.seconds:
            alone = format_seconds(self.seconds - self.waited)
            lines.append(
                f"cores        others had them for {format_seconds(self.waited)}; alone the run takes about {alone}"
            )
        chunks = f"{self.chunks_before:,} chunk{'s' * (self.chunks_before > 1)}"
        short = f"out of memory {self.out_of_memory} times"
        found_in = f", found in {' and '.join(self.not_finite_in)}" if self.not_finite_in else ""
        on_occasion = [
            (
                self.pairs_before,
                f"resumed      {self.pairs_before / max(1, self.pairs):.1%} of the pairs were attended before",
            ),
            (self.chunks_before, f"before       {chunks} finished, checksums of {self.chunks_compared:,} compared"),
            (self.other_bits, f"bits         other bits than those of an uninterrupted run: {printable(self.other_bits)}"),
            (self.rows_without_keys, f"rows         {self.rows_without_keys:,} rows attend no key: {NO_KEYS}"),
            (
                self.not_finite,
                f"inputs       {self.not_finite:,} elements are NaN or Inf{found_in}; rows that attend them may be NaN",
            ),
            (self.out_not_finite, f"out          {self.out_not_finite:,} elements are NaN or Inf"),
            *((True, f"             {line}") for line in self.lost),
            (self.recomputed, f"partials     {self.recomputed} damaged on disk, and computed again"),
            (self.retried, f"tasks        {self.retried} failed and were tried again"),
            (self.workers_lost, f"workers      {self.workers_lost} lost; others took over"),
            (self.out_of_memory, f"device       {short} although the plan fits: continued with smaller tiles"),
        ]
        lines += [line for applies, line in on_occasion if applies]
        return "\n".join(map(printable, lines))


_COUNTED = ("bytes_read", "bytes_partials", "recomputed", "retried", "workers_lost", "out_of_memory")
_OF_CHUNKS = ("pairs", "rows_without_keys", "not_finite", "out_not_finite", "out_overflowed", "out_underflowed")
"""Fields of a report that are counted here, and those that are sums over the records of finished chunks."""


class Tally:
    """A listener that adds a run's events up."""

    def __init__(self) -> None:
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.computing = 0.0
        self.resumed = False
        self.pairs = 0
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.not_finite_in: set[str] = set()
        self.clock, self.computes_here, self._process = CoreClock(), False, name_process()

    def __call__(self, event: Event) -> None:
        self.clock.note()
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
            for name in {*event.not_finite} - self.not_finite_in:
                self.not_finite_in.add(name)
                infinity = "+Inf" if name == KEY_BIAS else "Inf"
                logger.warning("the array %s has NaN or %s: rows that attend them may be NaN", name, infinity)
        elif isinstance(event, Attended):
            self.pairs += event.pairs
            written = event.partial_bytes + event.checkpoint_bytes
            self._count(bytes_partials=written, out_of_memory=event.out_of_memory)
            if event.memory is not None and not event.memory.device:
                self.computes_here |= event.memory.process == self._process

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
        counts: dict[str, Any] = self.counts
        totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in _OF_CHUNKS}
        return RunReport(
            **totals,
            **counts,
            not_finite_in=tuple(sorted(self.not_finite_in)),
            seconds=seconds,
            predicted_seconds=plan.seconds,
            tokens=plan.problem.out_rows * plan.problem.batch,
            subproblems=plan.subproblems,
            lanes=lanes,
            pairs_before=max(0, totals["pairs"] - self.pairs) if self.resumed else 0,
            bytes_written=sum(record.bytes for record in records),
            out_elements=plan.problem.rows * plan.problem.columns,
            busy={kind: round(self.busy[kind], 3) for kind in ("staged", "attended", "merged", "written")},
            compute_busy=clock.rate(self.computing, seconds * lanes),
            chunks_before=compared.finished,
            chunks_compared=compared.compared,
            other_bits=other_bits,
            waited=min(seconds, self.clock.seconds(plan.threads * lanes)[1]) if self.computes_here else 0.0,
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )


def read_report(paths: ResultPaths) -> RunReport | None:
    """The report beside a result, or None; IntegrityError for a damaged one."""
    found = paths.load(REPORT, MOST_BYTES)
    return replace(RunReport.from_json(found), place=paths) if found else None


def time_with_pass(seconds: float, report: RunReport | None) -> str:
    """What a command took, in words, with the report of its second pass; None where that was done before."""
    if report is None:
        return f"{format_seconds(seconds)}; the pass was done before"
    since = " since it was resumed" if report.pairs_before else ""
    of_pass, predicted = format_seconds(report.seconds), format_seconds(report.predicted_seconds)
    return f"{format_seconds(seconds)}, of which the pass took {of_pass}{since} (predicted {predicted})"
