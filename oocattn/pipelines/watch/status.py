"""How far a run is, as other processes see it: the public function `status`."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from oocattn import clock
from oocattn.arguments import checked, path
from oocattn.errors import IntegrityError
from oocattn.pipelines.again import how_to_resume
from oocattn.pipelines.finished import scan_completed
from oocattn.pipelines.run import Run, find_unfinished
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.watch.attempts import read_attempts
from oocattn.pipelines.watch.elsewhere import run_elsewhere, seen_from_here
from oocattn.pipelines.watch.report import read_report
from oocattn.pipelines.watch.status_record import Status, tokens_of
from oocattn.problem.problem import Problem
from oocattn.records import from_json
from oocattn.storage.files.durable import read_json
from oocattn.storage.files.folders import is_folder
from oocattn.storage.journal.claims import Holder
from oocattn.storage.journal.lock import holder_silence, lock_holder
from oocattn.storage.paths import LOCK, STATUS, ResultLike, ResultPaths
from oocattn.storage.remote.options import StorageOptions, parse_options
from oocattn.storage.results.summary import read_summary
from oocattn.storage.state_folder import state_of_url

MOST_BYTES = 1 << 20  # of the file

SILENT_SECONDS, SILENT_SECONDS_ELSEWHERE = 10.0, 120.0
"""A run whose process has given no sign of life for so long is stopped: it gives one every second or two. Of another host
longer, for its clock may differ."""

logger = logging.getLogger("oocattn")


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
        return status_at(paths, seen, elsewhere, storage_options)


def status_at(
    paths: ResultPaths, seen: ResultPaths, elsewhere: Holder | None, storage_options: StorageOptions | None = None
) -> Status:
    """As `status`, of the run at `paths`, which is `seen` from here, and whose lock in a store is held `elsewhere`."""
    found, run = _status_at(seen, elsewhere)
    resume = ""
    if found.state == "interrupted":
        resume = how_to_resume(paths, run, storage_options)
    return replace(found, result=str(paths.result), resume=resume)


def _running_here(result: ResultLike, scratch: str | Path | None) -> Status | None:
    """The status of a live run to a URL whose job state is here: its store need not be asked, nor Zarr imported."""
    found = state_of_url(result, scratch)
    if found is None or not is_folder(found[1]):
        return None
    name, state = found
    holder, last = lock_holder(state / LOCK), last_written(state / STATUS)
    if holder is None or last is None or not last.subproblems:
        return None
    return replace(_running_status(last, holder, state), error="", holder=str(holder), result=name)


def _status_at(paths: ResultPaths, elsewhere: Holder | None) -> tuple[Status, Run | None]:
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
            last = last_written(paths.status)
        except IntegrityError as error:
            if not unfinished:
                raise
            logger.warning("%s; the bytes and the rate of the run are not known", error)
        if last is None and unfinished:  # killed before it was written, or it was written elsewhere
            last = Status("interrupted", error=_last_words(paths))
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


def _last_words(paths: ResultPaths) -> str:
    """How the last attempt that is recorded ended; "" where it was killed, or nothing is known."""
    with suppress(IntegrityError):
        found = read_attempts(paths)
        if found is not None and found.attempts:
            return found.attempts[-1].words
    return ""


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
        pairs=report.pairs,
        pairs_done=report.pairs,
        rate=report.rate,
        seconds=report.seconds,
        seconds_left=0.0,
        bytes_read=report.bytes_read,
        bytes_saved=report.bytes_partials,
        bytes_written=report.bytes_written,
        saved=saved,
        report=report,
    )


def last_written(path: Path) -> Status | None:
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
