"""How far a run is, as other processes see it: the public function `status`."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from oocattn import clock
from oocattn.arguments import checked, path
from oocattn.errors import IntegrityError
from oocattn.pipelines.again import how_to_resume
from oocattn.pipelines.finished import scan_completed
from oocattn.pipelines.run import Run, find_unfinished
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.watch.elsewhere import run_elsewhere, seen_from_here
from oocattn.pipelines.watch.report import RunReport, read_report
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Positive, Range, Seconds, document, from_json
from oocattn.shown import Shown, named_lines
from oocattn.storage.files.durable import read_json
from oocattn.storage.files.folders import is_folder
from oocattn.storage.journal.claims import Holder
from oocattn.storage.journal.lock import holder_silence, lock_holder
from oocattn.storage.paths import LOCK, STATUS, ResultLike, ResultPaths, state_of_url
from oocattn.storage.remote.options import StorageOptions, parse_options
from oocattn.storage.results.summary import read_summary
from oocattn.text import printable
from oocattn.units import format_bytes, format_seconds

FORMAT = 1
"""Of the JSON document."""

MOST_BYTES = 1 << 20  # of the file

SILENT_SECONDS, SILENT_SECONDS_ELSEWHERE = 10.0, 120.0
"""A run whose process has given no sign of life for so long is stopped: it gives one every second or two. Of another host
longer, for its clock may differ."""

logger = logging.getLogger("oocattn")

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
            gone = "" if self.error else "its process was killed, or the machine went down; "
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


@checked(scratch=path, storage_options=parse_options)
def status(
    result: ResultLike, *, scratch: str | Path | None = None, storage_options: StorageOptions | None = None
) -> Status:
    """How far the run to `result` is: from any process, whether or not a run is alive, and at once: it reads JSON alone.

    `scratch` and `storage_options` are those of the run. Without its folder of job state a run to a URL is known by what
    lies beside the result alone. Of a finished result it says what the certificate beside it says, if that is of this very
    result. Raises IntegrityError, with what to do, where the run's own files are damaged and no result is there.
    """
    running = _running_here(result, scratch)
    if running is not None:
        return running
    paths = ResultPaths.at(result, scratch, storage_options=storage_options)
    with seen_from_here(paths) as (seen, elsewhere):
        found, run = _status_at(seen, elsewhere)
        resume = (
            how_to_resume(paths, None if run is None else run.header.dataset, storage_options)
            if found.state == "interrupted"
            else ""
        )
        return replace(found, result=str(paths.result), resume=resume)


def _running_here(result: ResultLike, scratch: str | Path | None) -> Status | None:
    """The status of a live run to a URL whose job state is here: its store need not be asked, nor Zarr imported."""
    found = state_of_url(result, scratch)
    if found is None or not is_folder(found[1]):
        return None
    name, state = found
    holder, last = lock_holder(state / LOCK), _last_written(state / STATUS)
    if holder is None or last is None or not last.subproblems:
        return None
    return replace(_running_status(last, holder, state), error="", holder=str(holder), result=name)


def _status_at(paths: ResultPaths, elsewhere: Holder | None = None) -> tuple[Status, Run | None]:
    """Progress of the run to this result, and its record if it is unfinished and was looked at."""
    found = _read_status(paths, elsewhere)
    if found.state == "finished":
        certificate = read_summary(paths)
        if certificate is None:
            return found, None
        verdict = f"{certificate.made}: {certificate.verdict}"
        return replace(found, certificate=certificate.outcome, verdict=verdict), None
    known = found.state == "none" or (found.state == "running" and found.subproblems)
    begun = None if known else find_unfinished(paths, recost=False)
    if begun is None:
        return found, None
    plan, tokens = begun.plan, tokens_of(begun.plan.problem)
    schedule = Schedule(plan, 1, scan_completed(plan, begun.journal, paths.scratch).done)
    total, pairs = plan.subproblems, plan.problem.pairs
    share = schedule.pairs_left / max(1, pairs)
    counted = replace(
        found,
        subproblems=total,
        subproblems_done=total - schedule.left,
        pairs=pairs,
        pairs_done=pairs - schedule.pairs_left,
        tokens=tokens,
        batch=plan.problem.batch,
        seconds_left=tokens * share / found.rate if found.rate else plan.seconds * share,
    )
    return counted, begun


def _read_status(paths: ResultPaths, elsewhere: Holder | None) -> Status:
    """Progress of the run to this result, whether or not it is alive.

    Raises IntegrityError for a damaged file, and warns of one where the journal still says how far an interrupted run came.
    """
    here = paths.state_folder is not None and is_folder(paths.state)
    holder = lock_holder(paths.lock) if here and elsewhere is None else elsewhere
    unfinished = _is_unfinished(paths)
    last = None
    if holder is not None or unfinished:  # else it says nothing that the result does not
        try:
            last = _last_written(paths.status)
        except IntegrityError as error:
            if not unfinished:
                raise
            logger.warning("%s; the bytes and the rate of the run are not known", error)
        if last is None and unfinished:
            last = Status("interrupted")  # killed before it was written
    if last is None:
        recorded = paths.attributes() or {}
        if "problem" in recorded:
            return replace(_finished(paths, recorded["problem"]), result=str(paths.result))
        if paths.stored is not None and holder is None:
            return Status(**run_elsewhere(paths), result=str(paths.result))
        last = Status("none") if holder is None else _running_status(Status("running"), holder, paths.state)
    elif holder is not None:
        last = replace(_running_status(last, holder, paths.state), error="")  # which is of a run before this one
    else:
        last = replace(last, state="interrupted", dashboard="", stalled="")
    return replace(last, holder="" if holder is None else str(holder), result=str(paths.result))


def _running_status(last: Status, holder: Holder, state: Path) -> Status:
    """The status of a run that is alive; its process may be stopped."""
    running = replace(last, state="running")
    if holder.shares_kernel(Holder.this_process()):
        silence, most = holder_silence(state / LOCK), SILENT_SECONDS
    else:
        silence, most = clock.now() - (last.beat or clock.now()), SILENT_SECONDS_ELSEWHERE
    if silence < most:
        return running
    stopped = (
        f"{holder} is stopped, and its run with it: continue it (kill -CONT {holder.process}); or else {state} is on "
        "a file system that does not answer it"
    )
    return replace(running, stalled=stopped, stalled_since=clock.now() - silence)


def _is_unfinished(paths: ResultPaths) -> bool:
    """True if a run has begun and is not complete; IntegrityError for a bad journal."""
    try:
        return paths.unfinished is not None and not paths.is_published()
    except IntegrityError as error:
        if "problem" not in (paths.attributes() or {}):
            raise
        logger.warning("%s; the result itself is not affected", error)
        return False


def _finished(paths: ResultPaths, problem: object) -> Status:
    """The status of a finished result, from its report or else from its problem."""
    try:
        report = read_report(paths)
    except IntegrityError as error:  # the result is there
        logger.warning("the report of the run cannot be read: %s", error)
        report = None
    if report is None:
        tokens, batch = 0, 1
        with suppress(ValueError):
            found = from_json(Problem, problem)
            tokens, batch = tokens_of(found), found.batch
        return Status("finished", tokens=tokens, batch=batch, seconds_left=0.0)
    saved = 0.0
    with suppress(ValueError):
        saved = max(0.0, datetime.fromisoformat(report.finished).timestamp())
    return Status(
        "finished",
        report.subproblems,
        report.subproblems,
        report.tokens,
        rate=report.rate,
        seconds=report.seconds,
        seconds_left=0.0,
        bytes_read=report.bytes_read,
        bytes_saved=report.bytes_partials,
        bytes_written=report.bytes_written,
        saved=saved,
        report=report,
    )


def tokens_of(problem: Problem) -> int:
    """Tokens of a run: those of the queries that are asked, of all batch entries."""
    return problem.out_rows * problem.batch


def _last_written(path: Path) -> Status | None:
    """The status in a file, or None; IntegrityError unless `StatusFile` wrote it."""
    content = read_json(path, MOST_BYTES)
    if content is None:
        return None
    try:
        return from_json(Status, content)
    except ValueError as error:
        raise IntegrityError(
            f"{path}: not the status of a run ({error}); a run that is alive writes it again: ask again"
        ) from None
