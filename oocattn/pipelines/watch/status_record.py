"""What is known of a run at a moment: the record `Status`, and its words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from oocattn import clock
from oocattn.pipelines.watch.report import RunReport
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Positive, Range, Seconds, document
from oocattn.shown import Shown, named_lines
from oocattn.text import printable
from oocattn.units import format_bytes, format_seconds

FORMAT = 1
"""Of the JSON document."""

Outcome = Literal["", "passed", "inconclusive", "failed"]

State = Literal["none", "running", "interrupted", "finished"]


@dataclass(frozen=True, repr=False)
class Status(Shown):
    """Progress of the run to `result`.

    `state` is "none" (no run has begun), "running", "interrupted" (unfinished, and nobody works on it) or "finished".
    `subproblems` and `tokens` are those of the whole run, the tokens of the queries of all `batch` entries; 0 where they
    are not known: before a run has planned, and `subproblems` of a result without its report. `subproblems_done` need
    not be done again when an interrupted run is resumed. `pairs` and `pairs_done` are query-key pairs, of subproblems in
    flight too: they move tile by tile, and `share` with them. `rate` is in tokens/s of the work done since the run was
    started or resumed, `seconds` ago, and `bytes_read`, `bytes_saved` (as partials) and `bytes_written` (to the result)
    are those since then. `seconds_left` is wall time too, of an interrupted run at that rate, or as its plan predicts
    it; None where there is no plan yet. `saved` is when something was last brought to disk for good, in seconds since
    the epoch, or 0. A finished result has its `report`, and the figures of that. `beat` is when the run last wrote all
    this down, in seconds since the epoch: every second while it lives.

    `dashboard` is the address of a running run's, `holder` says who works on it, and `error` how an interrupted one ended.
    `certificate` is what `verify` found of this very result, "" where it was not verified, and `verdict` when and in words.
    `resume` is the command, or the call, that goes on with an interrupted run.
    `stalled` says why a run that is alive has not gone on since `stalled_since`, and what to do; or it is "".
    """

    state: State
    subproblems: Count = 0
    subproblems_done: Count = 0
    tokens: Count = 0
    rate: Annotated[float, Range(0.0, 1e18)] = 0.0
    seconds: Seconds = 0.0
    seconds_left: Seconds | None = None
    bytes_read: Count = 0
    bytes_saved: Count = 0
    bytes_written: Count = 0
    saved: Seconds = 0.0
    dashboard: str = ""
    holder: str = ""
    error: str = ""
    result: Annotated[str, ADDED] = ""
    certificate: Annotated[Outcome, ADDED] = ""
    verdict: Annotated[str, ADDED] = ""
    stalled: Annotated[str, ADDED] = ""
    stalled_since: Annotated[Seconds, ADDED] = 0.0
    beat: Annotated[Seconds, ADDED] = 0.0
    report: Annotated[RunReport | None, ADDED] = None
    resume: Annotated[str, ADDED] = ""
    batch: Annotated[Positive, ADDED] = 1
    pairs: Annotated[Count, ADDED] = 0
    pairs_done: Annotated[Count, ADDED] = 0

    @property
    def share(self) -> float:
        """Share of the work that is done, 0 to 1, whether the result is there or not."""
        if self.state == "finished":
            return 1.0
        done, total = (self.pairs_done, self.pairs) if self.pairs else (self.subproblems_done, self.subproblems)
        return min(1.0, done / total) if total else 0.0

    @property
    def tokens_done(self) -> int:
        """Tokens in the measure of the work that is done."""
        return int(self.tokens * self.share)

    def to_json(self) -> dict[str, Any]:
        """The status as a JSON document, with the shares that follow from its fields (docs/scripts.md)."""
        return document(FORMAT, self, "share", "tokens_done")

    def _line(self) -> str:
        state = "stalled" if self.stalled else self.state
        return f"{state}, {self.share:.0%} done, {self.result or 'of no result'}"

    def _table(self) -> list[tuple[str, str]]:
        report = named_lines(str(self.report)) if self.report else []
        first, *others = str(replace(self, report=None)).splitlines()
        rows = [("result", self.result), ("share", f"{self.share:.1%}"), ("status", first)]
        return [*rows, *(("", line) for line in others), *report]

    def __str__(self) -> str:
        if self.state == "none":
            return printable(
                f"none: no run to {self.result or 'this path'} has begun; one that was stopped while it planned left "
                "nothing to resume"
            )
        if self.state == "finished":
            lines = [f"finished in {format_seconds(self.seconds)}" if self.seconds else "finished"]
            lines += [f"certificate of {self.verdict}"] if self.certificate else []
            lines += str(self.report).splitlines() if self.report else []
            return "\n".join(map(printable, lines))
        if not self.subproblems:
            starting = f"stalled: {self.stalled}" if self.stalled else f"{self.state}: starting; {self.holder}"
            lines = [f"{self.state}: {self.error}" if self.error else starting, *self._next()]
            return "\n".join(map(printable, lines))
        state = "stalled" if self.stalled else self.state
        entries = f" in {self.batch:,} batch entries" if self.batch > 1 else ""
        kept = " are on disk" if self.state == "interrupted" else ""
        lines = [
            f"{state}: {self.subproblems_done:,} of {self.subproblems:,} subproblems{kept}, {self.tokens_done:,} of "
            f"{self.tokens:,} tokens{entries} ({self.share:.0%})"
        ]
        if self.rate:  # known from the first subproblem on
            lines[0] += f" after {format_seconds(self.seconds)}, {self.rate:,.0f} tokens/s"
        if self.bytes_read or self.bytes_saved or self.bytes_written:
            lines.append(
                f"{format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_saved)} of partials, "
                f"{format_bytes(self.bytes_written)} written{self._last_saved()}"
            )
        left = "time left not known" if self.seconds_left is None else f"about {format_seconds(self.seconds_left)} left"
        if self.stalled:
            lines.append(f"no progress for {format_seconds(max(0.0, clock.now() - self.stalled_since))}: {self.stalled}")
        if self.state == "running":
            lines.append(f"{'' if self.stalled else f'{left}; '}{self.holder}; dashboard {self.dashboard or 'none'}")
        if self.error:
            lines.append(f"it ended: {self.error}")
        if self.state == "interrupted":
            gone = "" if self.error else "its process was killed, the machine went down or its disk was full; "
            lines += [f"{gone}{left}; no process works on it", *self._next()]
        return "\n".join(map(printable, lines))

    def _next(self) -> list[str]:
        """The line on what goes on with it."""
        return [f"go on with: {self.resume}"] if self.resume else []

    def _last_saved(self) -> str:
        """When something was saved, where that is known: of a run that has ended, the last time may not be."""
        if not self.saved:
            return "; nothing saved yet" if self.state == "running" and not self.subproblems_done else ""
        return f"; last saved {format_seconds(max(0.0, clock.now() - self.saved))} ago"


def tokens_of(problem: Problem) -> int:
    """Tokens of a run: those of the queries that are asked, of all batch entries."""
    return problem.out_rows * problem.batch
