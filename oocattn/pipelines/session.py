"""From a plan to a committed result: what is at its path already, its lock, a run that begins or goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from oocattn import clock
from oocattn.errors import IntegrityError, LockedError, ResultExistsError, TimeLimitError
from oocattn.pipelines.finished import COMPARE_SECONDS, compare_finished
from oocattn.pipelines.resuming import (
    DatasetIdentity,
    Unfinished,
    begin_journal,
    describe,
    find_unfinished,
    result_differences,
)
from oocattn.pipelines.signals import InterruptedRunError, Interrupts
from oocattn.pipelines.watch.events import Callback
from oocattn.pipelines.watch.report import RunReport
from oocattn.pipelines.watch.status import StatusFile, read_report
from oocattn.pipelines.work import Work
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.storage.files.folders import is_folder, is_taken
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import Layout, RunState, is_untidy
from oocattn.verification.certificate import Summary
from oocattn.verification.certify import read_summary
from oocattn.version import versions

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client

    from oocattn.pipelines.engines.dask.enlisting import Roll

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Result:
    """A finished result: `out` [B, Hq, N, D] in the output's dtype, `lse` [B, Hq, N] float32, and how it came about.

    `report` is None for a result that was copied without the folder beside it. `certificate` sums up that of a result that
    was there already, where it was verified: it may have failed.
    """

    path: Path
    out: zarr.Array[Any]
    lse: zarr.Array[Any]
    report: RunReport | None
    certificate: Summary | None = None


@dataclass(frozen=True)
class Resuming:
    """How an unfinished run is gone on with.

    `accept_other_bits`: also where its result has other bits than that of an uninterrupted run. `check_finished`: compare
    the checksums of all finished chunks first, not only of as many as can be read in a few seconds.
    """

    accept_other_bits: bool = False
    check_finished: bool = False


@dataclass(frozen=True)
class _Execution:
    """What a run is carried out with: workers, listeners, the signals that are held back, and when it must have ended."""

    client: Client
    callbacks: Sequence[Callback]
    interrupts: Interrupts
    until: float

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self.interrupts.asked or clock.now() > self.until

    def check_waiting(self, plan: Plan) -> None:
        """Raise what ends a run that waits for its workers."""
        words = f"0 of {plan.subproblems:,} subproblems are done now, because it waited for workers"
        if self.interrupts.asked:
            raise InterruptedRunError(f"interrupted: {words}")
        if clock.now() > self.until:
            raise TimeLimitError(f"time limit reached: {words}")


def run_plan(
    plan: Plan,
    dataset: Dataset,
    paths: ResultPaths,
    client: Client,
    *,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    until: float = math.inf,
) -> Result:
    """Carry out a plan made for `dataset`: the part of `attention` after planning, for callers who plan themselves.

    It ends by `until`, a moment of `clock.now`. An unfinished run of an equal plan is resumed. Raises what `attention`
    raises.
    """
    refuse_to_replace_dataset(paths, dataset)
    if is_finished(paths, plan.problem, dataset, overwrite):
        return finished_result(paths)
    dataset.check_complete()
    with _locked(paths, until) as (lock, interrupts):
        state = RunState(paths, lock.claim)
        if is_finished(paths, plan.problem, dataset, overwrite):  # another run may have ended in between
            return open_result(paths.result)
        execution = _Execution(client, callbacks, interrupts, until)
        begun = None if overwrite else find_unfinished(paths)
        if begun is None:
            roll = _enlist(plan, dataset, state, execution)
            work = _begin(plan, dataset, state, overwrite, roll.computing)
        else:
            begun.check_asked(plan.problem, dataset)
            begun.check_plan(plan)
            logger.warning("%s: resuming the unfinished run that is there, as it was planned", paths.result)
            roll = _enlist(begun.plan, dataset, state, execution)
            work = _resume(begun, dataset, state, Resuming(), roll.computing, execution)
        _carry_out(work, roll, execution)
    return open_result(paths.result)


def resume_run(
    asked: Unfinished,
    dataset: Dataset,
    paths: ResultPaths,
    client: Client,
    callbacks: Sequence[Callback],
    until: float,
    resuming: Resuming,
) -> Result:
    """Go on with the unfinished run that is `asked` for: the part of `resume` after the start of a cluster.

    Raises ResultExistsError where another run has begun since.
    """
    with _locked(paths, until) as (lock, interrupts):
        begun = find_unfinished(paths)
        if begun is not None:  # else another process has finished it in between
            begun.check_run(asked)
            execution = _Execution(client, callbacks, interrupts, until)
            state = RunState(paths, lock.claim)
            roll = _enlist(begun.plan, dataset, state, execution)
            _carry_out(_resume(begun, dataset, state, resuming, roll.computing, execution), roll, execution)
    return open_result(paths.result)


@contextmanager
def _locked(paths: ResultPaths, until: float) -> Iterator[tuple[FileLock, Interrupts]]:
    """Lock a result, in its folder of job state, and hold signals back. A new folder is removed where no run began."""
    new = not is_taken(paths.state)
    paths.make_state()
    try:
        with FileLock(paths.lock, until) as lock, Interrupts() as interrupts:
            yield lock, interrupts
    finally:
        if new:
            with suppress(OSError):  # there is something in it
                paths.state.rmdir()


def _enlist(plan: Plan, dataset: Dataset, state: RunState, execution: _Execution) -> Roll:
    """The workers of the run, all of which are ready; the result is locked, and nothing of the run is written yet."""
    from oocattn.pipelines.engines.dask.enlisting import enlist
    from oocattn.pipelines.engines.dask.readiness import Expected

    expected = Expected.of(plan, dataset, state)
    return enlist(execution.client, expected, lambda: execution.check_waiting(plan))


def _carry_out(work: Work, roll: Roll, execution: _Execution) -> None:
    """Do what is left of a run; the result is locked."""
    from oocattn.pipelines.driver import run

    listeners: list[Callback] = [StatusFile(work.paths.status, work.state.claim), *execution.callbacks]
    run(work, execution.client, roll, listeners, execution.interrupts, execution.until)


def _begin(plan: Plan, dataset: Dataset, state: RunState, overwrite: bool, computing: Mapping[str, str]) -> Work:
    """A run at its beginning, whose workers compute with what is named; the result is locked."""
    identity = describe(plan.problem, dataset)
    made_with = {**versions(), **computing}
    layout = _layout(plan, {**identity, "plan": _decided(plan), "versions": made_with})
    growing = state.begin(layout, overwrite=overwrite)
    recorded = DatasetIdentity(**identity["dataset"], within_run=dataset.as_found.within_run)
    journal = begin_journal(state.paths, plan, recorded, growing, computing, state.claim)
    return Work(plan, dataset, recorded.within_run, state, growing, journal)


def _resume(
    begun: Unfinished,
    dataset: Dataset,
    state: RunState,
    resuming: Resuming,
    computing: Mapping[str, str],
    execution: _Execution,
) -> Work:
    """A run that was begun before; the result is locked."""
    plan, header = begun.plan, begun.header
    other_bits = begun.check_bits(computing, resuming.accept_other_bits)
    source = {"location": header.dataset.location, "fingerprint": header.dataset.fingerprint}
    attributes = {"problem": asdict(plan.problem), "dataset": source, "plan": _decided(plan)}
    growing = state.resume(begun.path, _layout(plan, attributes), replaces=header.replaces)
    journal = replace(begun.journal, claim=state.claim)
    if other_bits:
        journal.note_other_bits(other_bits)
    seconds = math.inf if resuming.check_finished else COMPARE_SECONDS
    compared = compare_finished(plan, growing.arrays, journal, seconds, lambda: execution.is_over)
    return Work(plan, dataset, dataset.as_found.within_run, state, growing, journal, compared)


def _layout(plan: Plan, attributes: Mapping[str, Any]) -> Layout:
    """Shape, dtype, chunks and attributes of the result."""
    problem = plan.problem
    shape = (problem.batch, problem.query_heads, problem.tokens, problem.head_dim)
    return Layout(shape, problem.out_dtype, plan.out_chunk_rows, attributes)


def _decided(plan: Plan) -> dict[str, Any]:
    """What a result says of its plan."""
    names = ("digest", "decomposition", "chunks", "span", "chunk_rows", "out_chunk_rows", "kernel", "rounds_weights")
    return {name: getattr(plan, name) for name in names}


def is_finished(paths: ResultPaths, problem: Problem, dataset: Dataset, overwrite: bool) -> bool:
    """Whether the result is there already. Raises ResultExistsError if something else is and may not be replaced."""
    found = paths.attributes()
    if found is None:
        return False
    if "problem" not in found:
        raise ResultExistsError(
            f"{paths.result} exists and is not a result of oocattn, and only those are replaced: remove it, or choose "
            "another path"
        )
    if overwrite:
        return False
    differing = result_differences(found, describe(problem, dataset))
    if not differing:
        return True
    raise ResultExistsError(
        f"{paths.result} exists and is not the result of this run ({differing}): choose another path, or replace it with "
        "overwrite=True (--overwrite)"
    )


def finished_result(paths: ResultPaths) -> Result:
    """The finished result that is there, tidied up. A warning says where its certificate failed."""
    tidy(paths)
    certificate = read_summary(paths)
    if certificate is not None and certificate.outcome == "failed":
        logger.warning(
            "%s is there, but its certificate of %s says %s; `oocattn verify` checks it again",
            paths.result,
            certificate.made,
            certificate.verdict,
        )
    return replace(open_result(paths.result), certificate=certificate)


def tidy(paths: ResultPaths) -> None:
    """Do what a run that was killed at its very end has left to do; a failure costs nothing but that."""
    with suppress(LockedError, IntegrityError, OSError):
        if is_folder(paths.state) and is_untidy(paths):
            with FileLock(paths.lock) as lock:
                RunState(paths, lock.claim).tidy()


def refuse_to_replace_dataset(paths: ResultPaths, dataset: Dataset) -> None:
    """Raise ResultExistsError where the result, or the folder of job state, would lie in the dataset or hold it."""
    if dataset.folder is None:
        return
    location = Path(dataset.location).resolve()
    for place in (paths.result, paths.state):
        ours = place.resolve()
        inside = any(ours.is_relative_to(location / name) for name in dataset.arrays)
        if inside or location.is_relative_to(ours):
            raise ResultExistsError(f"{place} belongs to the dataset {dataset.location}: choose another path for the result")


def open_result(result: str | Path) -> Result:
    """A finished result, its arrays open for reading. Raises IntegrityError where there is none."""
    paths = ResultPaths.at(result)
    if not is_taken(paths.result):
        raise IntegrityError(f"{paths.result}: no finished result here; `oocattn status` says whether one is under way")
    arrays = ResultArrays.open(paths.result)
    try:
        report = read_report(paths)
    except IntegrityError as error:  # the result is worth more
        logger.warning("the report of the run cannot be read: %s", error)
        report = None
    return Result(paths.result, arrays.out, arrays.lse, report)
