"""The full report of a run, finished or not: everything that is known of it, as one page and as JSON.

What a part of it cannot be read, the report says so and has the rest.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from oocattn.arguments import checked, path
from oocattn.errors import IntegrityError, OocattnError, ResultExistsError
from oocattn.pipelines.run import find_unfinished
from oocattn.pipelines.watch.attempts import Attempt, Attempts, Planned, read_attempts, with_end
from oocattn.pipelines.watch.elsewhere import seen_from_here
from oocattn.pipelines.watch.repeating import command_again, planned_of
from oocattn.pipelines.watch.status import last_written, status_at
from oocattn.pipelines.watch.status_record import Status
from oocattn.records import document
from oocattn.shown import Shown
from oocattn.storage.files.operations import words_of
from oocattn.storage.files.outputs import write_output
from oocattn.storage.locations import output_path
from oocattn.storage.paths import FULL_REPORT, REPORT_PAGE, ResultLike, ResultPaths
from oocattn.storage.remote.options import StorageOptions, parse_options
from oocattn.storage.results.summary import ResultAttributes
from oocattn.text import printable
from oocattn.units import format_bytes, format_seconds

FORMAT = 1
"""Of the JSON document."""

_FOLLOWS = ("links", "seconds", "headline")

RESOURCES_OF = {
    "read": ("read",),
    "copy": ("copy in", "copy out"),
    "compute": ("compute",),
    "partials": ("save",),
    "merge": ("merge",),
    "write": ("write",),
}
"""The resources of a lane that each link of a plan occupies; what merging takes, a plan counts with computing."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class LinkOutcome:
    """A link as planned, and as it was: bytes (of `compute` FLOP), and seconds in which a lane was busy with it, the mean
    of all lanes. What is not known is None."""

    name: str
    predicted: float | None
    predicted_seconds: float | None
    amount: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class FullReport(Shown):
    """Everything that is known of the run to `result`, when it was `made`.

    `status` says how far it is, and has the figures of a finished run and the verdict of its certificate. `plan` is None
    where nothing of it was recorded. `attempts` are the processes that worked on the run; between the first and the others
    `left_out` are not kept. `notes` say what is missing, and why. `files` are where the report was written.
    """

    producer: Literal["oocattn"] = "oocattn"
    result: str
    made: str
    problem: str
    dataset: str
    command: str
    versions: Mapping[str, str]
    status: Status
    plan: Planned | None
    attempts: tuple[Attempt, ...]
    left_out: int
    notes: tuple[str, ...]
    files: tuple[str, ...] = field(default=(), compare=False)

    @property
    def seconds(self) -> float:
        """Wall time of all attempts, or else of the one that finished the run."""
        return sum(attempt.seconds for attempt in self.attempts) if self.attempts else self.status.seconds

    def numbered(self) -> list[tuple[int, Attempt]]:
        """The attempts, each with its number among all, also those that are left out."""
        return [(number + (self.left_out if number > 1 else 0), each) for number, each in enumerate(self.attempts, 1)]

    @property
    def headline(self) -> str:
        """How far the run is, in a line."""
        status, tries = self.status, len(self.attempts) + self.left_out
        within = f" within {tries} attempts" if tries > 1 else ""
        if status.state == "finished":
            if not self.attempts and status.report and status.report.pairs_before:
                within = " since it was resumed"
            took = f" in {format_seconds(self.seconds)}{within}" if self.seconds else ""
            predicted = f" (predicted {format_seconds(self.plan.seconds)})" if self.plan else ""
            return f"finished{took}{predicted if took else ''}"
        state = "stalled" if status.stalled else status.state
        words = f": {status.stalled or status.error}" if status.stalled or status.error else ""
        return f"{state} at {status.share:.0%}, {format_seconds(self.seconds)} of work{within}{words}"

    @property
    def links(self) -> tuple[LinkOutcome, ...]:
        """The links of the plan, predicted against what all attempts together took."""
        planned = {link.name: link for link in self.plan.links} if self.plan else {}
        amounts = self._amounts()
        found = []
        for name, resources in RESOURCES_OF.items():
            link = planned.get(name)
            took = None
            if self.attempts:
                took = sum(sum(each.busy.get(one, 0.0) for one in resources) / max(1, each.lanes) for each in self.attempts)
            outcome = LinkOutcome(
                name, link.amount if link else None, link.seconds if link else None, amounts.get(name), took
            )
            if any((outcome.predicted, outcome.predicted_seconds, outcome.amount, outcome.seconds)):
                found.append(outcome)
        return tuple(found)

    def _amounts(self) -> dict[str, float]:
        """What was read, copied, computed, saved and written."""
        if not self.attempts:
            report = self.status.report
            if report is None:
                return {}
            return {"read": report.bytes_read, "partials": report.bytes_partials, "write": report.bytes_written}
        total = {
            name: sum(getattr(attempt, name) for attempt in self.attempts)
            for name in ("bytes_read", "bytes_saved", "bytes_written", "bytes_copied_in", "bytes_copied_out", "pairs")
        }
        found = {"read": total["bytes_read"], "partials": total["bytes_saved"], "write": total["bytes_written"]}
        found["copy"] = total["bytes_copied_in"] + total["bytes_copied_out"]
        if self.plan is None:
            return found
        return {**found, "compute": self.plan.flops * total["pairs"] / max(1, self.plan.pairs)}

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document (docs/scripts.md)."""
        content = document(FORMAT, self, *_FOLLOWS)
        del content["files"]
        return {**content, "status": self.status.to_json()}

    def to_html(self, path: str | Path) -> Path:
        """Write the page as a file, which needs no other; return its path.

        Raises ResultExistsError where something is there that oocattn has not written, and ProblemError where its folder
        does not exist or cannot be written to.
        """
        place = output_path(path, "report")
        write_output(place, lambda file: file.write(self.page()))
        return place

    def page(self) -> str:
        """The page, as HTML."""
        from oocattn.pipelines.watch.report_page import report_page

        return report_page(self)

    def _line(self) -> str:
        return f"{self.headline}, {self.result}"

    def _table(self) -> list[tuple[str, str]]:
        names = ("result", "problem", "dataset", "command", "made")
        rows = [("run", self.headline), *((name, str(getattr(self, name))) for name in names)]
        rows += [(f"attempt {number}", describe_attempt(each)) for number, each in self.numbered()]
        rows += [("certificate", self.status.verdict)]
        return rows + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        lines = [f"{name:<12} {printable(value)}" for name, value in self._table() if value]
        lines += [f"{'written':<12} {printable(file)}" for file in self.files]
        return "\n".join(lines)


def describe_attempt(attempt: Attempt) -> str:
    """An attempt in a line."""
    words = f": {attempt.words}" if attempt.words else ""
    return ", ".join(
        [
            f"{attempt.state} after {format_seconds(attempt.seconds)}{words}",
            f"{attempt.subproblems:,} subproblems, {format_bytes(attempt.bytes_read)} read",
            *(f"{count:,} {what}" for what, count in attempt.faults.items() if count),
            attempt.process,
        ]
    )


@checked(scratch=path, storage_options=parse_options)
def report(
    result: ResultLike, *, scratch: str | Path | None = None, storage_options: StorageOptions | None = None
) -> FullReport:
    """Everything that is known of the run to `result`: finished, interrupted or running.

    `scratch` and `storage_options` are those of the run. Nothing is written: `to_html` makes a page of it, and the command
    `oocattn report` writes page and JSON beside the result. Raises IntegrityError where no run has begun.
    """
    return full_report(ResultPaths.at(result, scratch, storage_options=storage_options))


def full_report(paths: ResultPaths) -> FullReport:
    """The full report of the run at these places. Raises IntegrityError where none has begun."""
    with seen_from_here(paths) as (seen, elsewhere):
        status = status_at(paths, seen, elsewhere)
        if status.state == "none":
            raise IntegrityError(f"{paths.result}: no run to it has begun, so there is nothing to report")
        notes: list[str] = []
        known = _recorded(seen, status, notes)
        attempts = _attempts_at(seen, known, notes)
        tried = () if attempts is None else _with_last_end(attempts, status, seen)
    if attempts is not None:
        known = replace(known, plan=attempts.planned)
        if attempts.left_out:
            notes.append(f"{attempts.left_out:,} attempts after the first are not kept, nor in times and amounts")
    asked = known if known.plan is None else known.plan
    return FullReport(
        result=printable(paths.result),
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        problem=asked.problem,
        dataset=asked.dataset,
        command=asked.command,
        versions=known.versions,
        status=status,
        plan=known.plan,
        attempts=tried,
        left_out=0 if attempts is None else attempts.left_out,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Known:
    """What the result, or the journal of an unfinished run, says."""

    problem: str = ""
    dataset: str = ""
    command: str = ""
    digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: Planned | None = None


def _attempts_at(paths: ResultPaths, known: _Known, notes: list[str]) -> Attempts | None:
    """The attempts that are recorded of this run."""
    try:
        attempts = read_attempts(paths)
    except (OocattnError, OSError) as error:
        notes.append(f"the attempts at the run are not known: {words_of(error)}")
        return None
    if attempts is None:
        notes.append("no attempts are recorded: the run is one of an older version, or its folder was not copied")
    elif known.digest not in ("", attempts.planned.digest):
        notes.append("the attempts that are recorded are those of another run, and left out")
        return None
    return attempts


def _with_last_end(attempts: Attempts, status: Status, paths: ResultPaths) -> tuple[Attempt, ...]:
    """The attempts, the last of which may not have said how it ended, nor what it left on disk."""
    if not attempts.attempts:
        return ()
    *others, newest = attempts.attempts
    last = None
    with suppress(IntegrityError, OSError):
        last = last_written(paths.status)
    return (*others, with_end(newest, status, last))


def _recorded(paths: ResultPaths, status: Status, notes: list[str]) -> _Known:
    try:
        if status.state == "finished":
            found = ResultAttributes.read(paths)
            plan = (paths.attributes() or {}).get("plan")
            digest = plan.get("digest") if isinstance(plan, Mapping) else None
            place = found.dataset
            return _Known(
                problem=printable(found.problem),
                dataset=printable(place.location),
                command=command_again(found.problem, place.location, place.tensors, str(paths.result), found.plan),
                digest=digest if isinstance(digest, str) else "",
                versions=found.versions,
            )
        run = find_unfinished(paths, recost=False)
    except (OocattnError, OSError) as error:
        notes.append(f"what was asked is not known: {words_of(error)}")
        return _Known()
    if run is None:
        return _Known()
    planned = planned_of(run)
    return _Known(digest=planned.digest, versions=run.header.versions, plan=planned)


def write_full_report(report: FullReport, paths: ResultPaths) -> FullReport:
    """Write the page and its JSON beside a result, durably; return the report with where they are.

    Raises ResultExistsError where something has a name of theirs that oocattn has not written.
    """
    texts = {FULL_REPORT: json.dumps(report.to_json(), indent=1) + "\n", REPORT_PAGE: report.page()}
    for name, ours in paths.are_ours(*texts).items():
        if ours is False:
            raise ResultExistsError(
                f"{name} beside {paths.result} was not written by oocattn, which replaces only its own files: move it away"
            )
    return replace(report, files=paths.save(texts))


def write_report(
    result: ResultLike, *, scratch: str | Path | None = None, storage_options: StorageOptions | None = None
) -> FullReport:
    """As `report`; page and JSON are written beside the result.

    A run that ends meanwhile writes its own, which these may have replaced: the files that stay say how it ended.
    """
    paths = ResultPaths.at(result, scratch, storage_options=storage_options)
    written = write_full_report(full_report(paths), paths)
    if written.status.state != "finished" and (now := full_report(paths)).status.state == "finished":
        return write_full_report(now, paths)
    return written


def renew_full_report(paths: ResultPaths) -> None:
    """Write the report again, now that there is a certificate, unless the files that the run wrote are there no more."""
    if all(paths.are_ours(FULL_REPORT, REPORT_PAGE).values()):
        keep_full_report(paths)


def keep_full_report(paths: ResultPaths) -> None:
    """Write the report of a finished run beside its result. A failure of any kind is logged: the result is there."""
    try:
        write_full_report(full_report(paths), paths)
    except Exception as error:
        logger.warning("the report of the run was not written: %s; `oocattn report` writes it", words_of(error))
