"""The driver of a run: attempts to do what is left until nothing is, and commits the result.

A failure that a run recovers from (a damaged partial, a failed task, a lost worker) ends an attempt. The next one does what
then is left, as a resumed run does.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

from oocattn import clock
from oocattn.errors import OocattnError, RemoteError, TaintedError, TaskError, TimeLimitError, WorkerLostError
from oocattn.pipelines.attempt import Attempt
from oocattn.pipelines.deadline import MARGIN_SECONDS, Deadline
from oocattn.pipelines.engines.base import Engine, WorkersChangedError
from oocattn.pipelines.failing import insist
from oocattn.pipelines.finished import (
    FinishedChunk,
    ScanResult,
    finished_chunks,
    gather_checksums,
    is_written,
    scan_completed,
)
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.store import DamagedPartialError
from oocattn.pipelines.run import Run
from oocattn.pipelines.schedule import NOTHING_COMPLETED, Schedule
from oocattn.pipelines.signals import InterruptedRunError, Interrupts
from oocattn.pipelines.summing import write_sums
from oocattn.pipelines.watch.events import Callback, Committed, Ended, Event, Failed, Listeners, Recovered, Started
from oocattn.pipelines.watch.report import RunReport, Tally
from oocattn.planning.plan import Plan
from oocattn.storage.files.operations import describe_error, is_disk_full, words_of
from oocattn.storage.journal.journal import ChunkId
from oocattn.storage.paths import REPORT

ATTEMPTS = 3  # after so many failures at one place, or anywhere with nothing done in between, the run ends

COMMIT = "the commit of the result"
SUMMED = " while sums over rows were added up: what was done is on disk"
WAITED = " while it waited for workers: what was done is on disk"

COUNTED_AS = {DamagedPartialError: "recomputed", TaskError: "retried", WorkerLostError: "workers_lost"}
"""What each failure that a run recovers from is counted as."""

Failure = DamagedPartialError | TaskError | WorkerLostError

logger = logging.getLogger("oocattn")


def carry_out(
    run: Run, engine: Engine, callbacks: Sequence[Callback], interrupts: Interrupts, until: float = math.inf
) -> RunReport:
    """Do what is left of a run on an engine whose workers are ready, and commit the result.

    Raises what stopped it: IntegrityError where the ledger, a partial or the dataset is not what it must be, TaskError,
    WorkerLostError, OSError as the file system does, and TimeLimitError where it would not end by `until` (seconds since
    the epoch). Then the result has not appeared under its name, and what was done is on disk; but after an IntegrityError
    that says so it is discarded. A signal that `interrupts` hold back ends it when what is in flight is on disk. A callback
    that raises an `Exception` is logged and dropped; any other `BaseException` of a callback ends the run.
    """
    start = clock.now()
    plan, tally, listeners = run.plan, Tally(), Listeners(callbacks)

    def emit(event: Event) -> None:
        tally(event)
        listeners(event)

    try:
        lanes = _drive(run, engine, emit, start, interrupts, until)
        finished = insist(COMMIT, lambda: _all_finished(run, engine))
        _check_pairs(plan, finished)
        insist(COMMIT, lambda: write_sums(run, lambda: interrupts.check(until - MARGIN_SECONDS - clock.now(), SUMMED)))
        seconds, other_bits = clock.now() - start, run.journal.other_bits
        report = tally.report(plan, finished, seconds=seconds, lanes=lanes, compared=run.compared, other_bits=other_bits)
        insist(COMMIT, lambda: run.result.record(gather_checksums(plan, finished)))
        run.state.claim.check()
        insist(COMMIT, lambda: run.paths.save({REPORT: json.dumps(report.to_json(), indent=1)}))
        insist(COMMIT, lambda: run.state.commit(run.growing))
    except BaseException as error:
        try:
            emit(_failed(run, engine, error, start))
        finally:
            if isinstance(error, TaintedError):
                run.state.discard(run.growing)
        if is_disk_full(error):
            raise _no_space(cast(OSError, error), run) from error
        raise
    try:
        run.state.tidy()
    except (OocattnError, OSError) as error:  # the result is there: `resume` tidies up
        logger.warning("%s is complete, but not everything beside it was removed: %s", run.paths.result, words_of(error))
    for line in report.lost:
        logger.warning("%s: %s", run.paths.result, line)
    now = clock.now()
    emit(Committed(start=now, stop=now, path=str(run.paths.result)))
    emit(Ended(start=start, stop=now, report=report))
    return report


def _failed(run: Run, engine: Engine, error: BaseException, start: float) -> Failed:
    """What ended the run, and what is on disk then: nothing after an error that has it discarded."""
    said = isinstance(error, InterruptedRunError | TimeLimitError)
    words, stopped = str(error) if said else describe_error(error), said or isinstance(error, KeyboardInterrupt)
    found: dict[str, Any] = {}
    with suppress(Exception):  # what ended the run is to be told
        tainted, plan = isinstance(error, TaintedError), run.plan
        if not isinstance(error, TaintedError | RemoteError):
            _refresh(run, engine)
        done = NOTHING_COMPLETED if tainted else scan_completed(plan, run.journal, run.paths.scratch).done
        schedule = Schedule(plan, 1, done)
        found = {"done": done, "left": schedule.left, "pairs_left": schedule.pairs_left}
    return Failed(start=start, stop=clock.now(), error=words, stopped=stopped, **found)


def _no_space(error: OSError, run: Run) -> OSError:
    """What to do about a disk that is full, as the whole run has it; a quota says so itself."""
    go_on = "resume" if run.plan.problem.second_pass is None else "ask for it again"
    if error.errno == errno.ENOSPC:
        words = f"no space left for the result and its partials; make room and {go_on}"
        return OSError(errno.ENOSPC, words, str(run.paths.state))
    return OSError(error.errno, f"{words_of(error)}, then {go_on}", str(run.paths.state))


def _all_finished(run: Run, engine: Engine) -> dict[ChunkId, FinishedChunk]:
    """The records of all chunks. Raises OSError where the journal does not give one of them back."""
    plan = run.plan
    _refresh(run, engine)
    finished = finished_chunks(plan, run.journal)
    chunks = [chunk for chunk in range(plan.query_chunks) if plan.query_rows(chunk)]
    missing = set(itertools.product(range(plan.problem.head_groups), chunks)) - finished.keys()
    if missing:
        raise OSError(f"{run.paths.state}: the records of {len(missing):,} finished chunks cannot be read; resume")
    if run.paths.stored is not None:  # where others may write as well
        listed = run.result.listed()
        gone = sum(not is_written(plan, listed, *place) for place in finished)
        if gone:
            raise OSError(f"{run.paths.result}: {gone:,} finished chunks are not there any more; resume")
    return finished


def _check_pairs(plan: Plan, finished: Mapping[ChunkId, FinishedChunk]) -> None:
    pairs = sum(record.pairs for record in finished.values())
    if pairs != plan.problem.pairs:
        raise TaintedError(
            f"{pairs:,} query-key pairs were attended, expected {plan.problem.pairs:,}; the result is discarded, run again"
        )


def _drive(run: Run, engine: Engine, emit: Callback, start: float, interrupts: Interrupts, until: float) -> int:
    """Attempt to do what is left until nothing is; return how many lanes did the last of it."""
    limits, deadline = FailureLimits(), Deadline(until, run.plan)
    started = partial(Started, start=start, stop=start, plan=run.plan, dashboard=engine.dashboard)
    recovered: Recovered | None = None
    while True:
        # After a partial was found damaged, so are all others looked for.
        thorough = recovered is not None and recovered.recomputed > 0
        found = insist("the search for finished work", partial(_look, run, engine, thorough))
        schedule = Schedule(run.plan, engine.lane_count, found.done)
        left, pairs = schedule.left, schedule.pairs_left
        limits.note_progress(left - len(found.done.chunks))
        if recovered is None:
            resumed = bool(found.done.chunks or found.done.partials)
            emit(started(left=left, pairs_left=pairs, resumed=resumed, recomputed=found.damaged, done=found.done))
        else:
            recomputed = recovered.recomputed + found.torn
            emit(replace(recovered, left=left, pairs_left=pairs, recomputed=recomputed, done=found.done))
        try:
            Attempt(run, engine.lanes(run, deadline), schedule, emit, deadline, interrupts).drive()
            return engine.lane_count
        except (DamagedPartialError, TaskError, WorkerLostError) as error:
            now, changed = clock.now(), isinstance(error, WorkersChangedError)
            if not changed:  # else nothing has failed
                limits.add(error)
            recovered = Recovered(start=now, stop=now, error=str(error), **_counted(error))
            engine.replenish(lambda: interrupts.check(deadline.seconds_left, WAITED), replacements=not changed)
            logger.warning("%s; the run continues with the rest", error)


def _refresh(run: Run, engine: Engine, whole: bool = False) -> None:
    """Have here what lanes elsewhere have put into the store."""
    if run.journal.mirror is not None and not engine.in_process:
        run.journal.mirror.refresh(whole=whole)


def _look(run: Run, engine: Engine, thorough: bool) -> ScanResult:
    """What is done; what serves nothing is removed, also what workers left that died while they wrote."""
    run.state.remove_leftovers()
    _refresh(run, engine, thorough)
    found = scan_completed(run.plan, run.journal, run.paths.scratch, run.result, thorough=thorough)
    files = PartialFiles(run.paths.scratch, run.journal.run, mirror=run.journal.mirror)
    for path in found.useless:
        files.discard(path)
    return found


def _counted(error: Failure) -> dict[str, Any]:
    """What a failure, or a change of workers, counts as."""
    if isinstance(error, WorkersChangedError):
        return {"workers_lost": error.leaving}
    return {COUNTED_AS[type(error)]: 1}


class FailureLimits:
    """Counts what has failed so far. A run has finitely many places and subproblems, so it ends, whatever fails."""

    def __init__(self) -> None:
        self._at: Counter[str] = Counter()
        self._in_a_row = 0
        self._fewest_left = math.inf

    def note_progress(self, left: int) -> None:
        """Subproblems that are left, less finished chunks: where these become fewer, the run goes on despite failures."""
        if left < self._fewest_left:
            self._fewest_left = left
            self._in_a_row = 0

    def add(self, error: Failure) -> None:
        """Raise the error where it is one too many."""
        place = _place(error)
        self._at[place] += 1
        self._in_a_row += 1
        if self._in_a_row >= ATTEMPTS or (place and self._at[place] >= ATTEMPTS):
            raise error


def _place(error: Failure) -> str:
    """Where something went wrong; "" for the loss of a worker, which may come as often as it likes while work gets done."""
    if isinstance(error, TaskError):
        return error.work
    if isinstance(error, DamagedPartialError):
        return f"partial of subproblem {error.subproblem} for chunk {error.chunk} of head group {error.head_group}"
    return ""
