"""From what is asked for to a committed result: what is there already, the plan, the lock, a run that begins or goes on.

A result is looked for before planning, as one that is there costs no start, and under the lock, as another process may have
begun or finished a run in between. It is one look, `find`, taken twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from oocattn import clock
from oocattn.cores import Workers
from oocattn.errors import ProblemError
from oocattn.naming import by_face
from oocattn.pipelines.again import how_to_pass
from oocattn.pipelines.deadline import MARGIN_SECONDS
from oocattn.pipelines.engines.base import Engine, warn_of_failure
from oocattn.pipelines.existing import (
    Found,
    Request,
    check_bits,
    check_chosen,
    check_inputs,
    check_plan,
    check_precise,
    check_run,
    describe,
    find,
    finished_result,
    open_dataset,
    result_at,
)
from oocattn.pipelines.finished import COMPARE_SECONDS, compare_finished
from oocattn.pipelines.passes import judging, passes_over, remove_pass
from oocattn.pipelines.result import Result
from oocattn.pipelines.run import Run, begin_run, find_unfinished
from oocattn.pipelines.signals import Interrupts
from oocattn.pipelines.watch.attempt_log import AttemptLog
from oocattn.pipelines.watch.board import Board
from oocattn.pipelines.watch.events import Callback, Listeners
from oocattn.pipelines.watch.full_report import keep_full_report
from oocattn.pipelines.watch.history import keep_run
from oocattn.pipelines.watch.progress_log import ProgressLog
from oocattn.pipelines.watch.status_file import StatusFile
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.candidates import Choices
from oocattn.planning.measure import plan_here
from oocattn.planning.plan import Plan
from oocattn.records import to_json
from oocattn.storage.files.folders import bytes_in, free_disk, is_taken
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.opening import InputsLike
from oocattn.storage.make.create import out_dimensions
from oocattn.storage.paths import ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.growing import Layout, RunState
from oocattn.storage.results.locking import fetch_state, hold_lock, remove_state
from oocattn.storage.results.marks import describe_mark, mark_of_other
from oocattn.units import format_bytes
from oocattn.version import versions

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Resuming:
    """How an unfinished run is resumed.

    `accept_other_bits`: also where its result has other bits than that of an uninterrupted run. `check_finished`: compare
    the checksums of all finished chunks first, not only of as many as can be read in a few seconds.
    """

    accept_other_bits: bool = False
    check_finished: bool = False


@dataclass(frozen=True)
class _Session:
    """A run under the lock of its result: an engine, listeners, the signals held back, and when it must have ended."""

    state: RunState
    engine: Engine
    callbacks: Sequence[Callback]
    interrupts: Interrupts
    until: float

    def begin(self, plan: Plan, request: Request) -> Run:
        """Begin a run."""
        computing = self._enlist(plan, request.dataset)
        made_with = {**versions(), **computing}
        described = describe(plan.problem, request.dataset)
        described["dataset"]["samples"] = request.dataset.samples
        attributes = {**described, "plan": _decided(plan), "versions": made_with}
        growing = self.state.begin(_layout(plan, attributes), overwrite=request.overwrite)
        _warn_of_space(plan, self.state.paths)
        for found in passes_over(self.state.paths):  # over a result that is replaced, or was removed
            with warn_of_failure(f"{found.result} was not removed"), judging(found, 0.0):
                remove_pass(found, self.until)
        return begin_run(self.state, plan, request.dataset, growing, computing)

    def resume(self, found: Run, dataset: Dataset, resuming: Resuming) -> Run:
        """Take up a run that was begun before."""
        plan, source = found.plan, found.header.dataset
        computing = self._enlist(plan, dataset)
        other_bits = check_bits(found, computing, resuming.accept_other_bits)
        recorded = {name: value for name, value in to_json(source).items() if name != "within_run"}
        attributes = {"problem": to_json(plan.problem), "dataset": recorded, "plan": _decided(plan)}
        self.state.resume(found.growing, _layout(plan, attributes))
        run = replace(found, journal=replace(found.journal, claim=self.state.claim), opened=dataset, computing=computing)
        if other_bits:
            run.journal.note_other_bits(other_bits)
        seconds = math.inf if resuming.check_finished else COMPARE_SECONDS
        return replace(run, compared=compare_finished(plan, run.result, run.journal, seconds, self._is_over))

    def carry_out(self, run: Run) -> Result:
        """Do what is left of a run."""
        from oocattn.pipelines.driver import carry_out

        listeners = Listeners(self.callbacks)
        board = Board(str(run.paths.result), partial(bytes_in, run.paths.scratch))
        place = run.paths.status, self.state.claim
        with (
            StatusFile(*place, lambda: listeners.kept_by, ProgressLog()) as status_file,
            self.engine.show(board.record),
        ):
            watching: list[Callback] = [AttemptLog(run), status_file, board, listeners]
            carry_out(run, self.engine, watching, self.interrupts, self.until)
        if run.plan.problem.second_pass is None:  # else it is removed as soon as it was used
            keep_full_report(run.paths)
        return replace(result_at(run.paths), plan=run.plan)

    def _enlist(self, plan: Plan, dataset: Dataset) -> Mapping[str, str]:
        """Have the workers ready; return what they compute with. Nothing of the run is written yet."""
        words = f": 0 of {plan.subproblems:,} subproblems are done now, because it waited for workers"
        until = self.until - MARGIN_SECONDS / 2  # later, workers could do nothing, and the run would end late
        return self.engine.enlist(plan, dataset, self.state, lambda: self.interrupts.check(until - clock.now(), words))

    def _is_over(self) -> bool:
        return self.interrupts.asked or clock.now() > self.until


def attend(request: Request, choices: Choices, workplace: Workplace, callbacks: Sequence[Callback], until: float) -> Result:
    """Have the result that is asked for: find it, or plan it as is chosen and run it. Raises what `attention` raises."""
    workplace.check_result(request.paths)
    fetch_state(request.paths)
    found = find(request)
    if found is Found.FINISHED:
        if choices.precise:
            check_precise(request.paths)
        return finished_result(request.paths)
    if isinstance(found, Run):
        check_chosen(found, choices)

    def decide(workers: Workers) -> Plan:
        if isinstance(found, Run):
            return found.plan
        paths, to_store = request.paths, request.paths.stored is not None
        chosen = request.dataset, request.problem, choices, workers, paths.state, workplace.engine
        return plan_here(*chosen, to_store=to_store)

    kernel, precise = choices.kernel, choices.precise
    with workplace.prepare(request.problem, kernel, decide, until, precise=precise) as (engine, plan):
        result = run_plan(plan, request, engine, callbacks=callbacks, until=until)
    if found is Found.NOTHING and workplace.client is None and result.report is not None:  # all of it, on this machine
        keep_run(plan, result.report.seconds - result.report.waited)
    return result


def run_plan(
    plan: Plan, request: Request, engine: Engine, *, callbacks: Sequence[Callback] = (), until: float = math.inf
) -> Result:
    """Carry out a plan for what is asked for: the part of `attend` after planning.

    It ends by `until`, a moment of `clock.now`. An unfinished run of an equal plan is resumed.
    """
    request.dataset.check_complete()
    with _locked(request.paths, engine, callbacks, until) as session:
        found = find(request)
        if isinstance(found, Run):
            check_plan(found, plan)
            logger.warning("%s: resuming the unfinished run that is there, as it was planned", request.paths.result)
            return session.carry_out(session.resume(found, request.dataset, Resuming()))
        if found is Found.NOTHING:
            return session.carry_out(session.begin(plan, request))
    return finished_result(request.paths)


def resume(
    paths: ResultPaths,
    named: InputsLike | None,
    resuming: Resuming,
    workplace: Workplace,
    callbacks: Sequence[Callback],
    until: float,
    storage_options: StorageOptions | None = None,
) -> Result:
    """Go on with the unfinished run to a result, over the dataset that is named or that its journal names."""
    workplace.check_result(paths)
    fetch_state(paths)
    found = find_unfinished(paths)
    if found is None:
        if attributes := paths.attributes():
            if named is not None:
                check_inputs(paths, attributes, named, storage_options)
            return finished_result(paths)
        mark = mark_of_other(paths)
        elsewhere = "" if mark is None else f" from here, but one with its job state {describe_mark(mark)}"
        raise ProblemError(
            f"{paths.result}: no run to resume{elsewhere}; begin one with {by_face('oocattn.attention', '`oocattn run`')}"
        )
    if found.plan.problem.second_pass is not None:
        words = how_to_pass(paths, found.plan.problem)
        raise ProblemError(f"{paths.result} is a second pass over another result: go on with {words}")
    plan, dataset = found.plan, open_dataset(found, named, storage_options)
    with workplace.prepare(plan.problem, plan.kernel, lambda _: plan, until) as (engine, _):
        return resume_run(found, dataset, engine, callbacks, until, resuming)


def resume_run(
    asked: Run, dataset: Dataset, engine: Engine, callbacks: Sequence[Callback], until: float, resuming: Resuming
) -> Result:
    """Go on with the unfinished run that is `asked` for: the part of `resume` after the start of a cluster.

    Raises ResultExistsError where another run has begun since.
    """
    with _locked(asked.paths, engine, callbacks, until) as session:
        found = find_unfinished(asked.paths)
        if found is not None:  # else another process has finished it in between
            check_run(found, asked)
            return session.carry_out(session.resume(found, dataset, resuming))
    return finished_result(asked.paths)


@contextmanager
def _locked(paths: ResultPaths, engine: Engine, callbacks: Sequence[Callback], until: float) -> Iterator[_Session]:
    """Lock a result, in its folder of job state, and hold signals back. A new folder is removed where no run began."""
    new = not is_taken(paths.state)
    paths.make_state()
    try:
        with hold_lock(paths, until) as claim, Interrupts() as interrupts:
            yield _Session(RunState(paths, claim), engine, callbacks, interrupts, until)
    finally:
        remove_state(paths)
        if new:
            with suppress(OSError):  # there is something in it
                paths.state.rmdir()


def _layout(plan: Plan, attributes: Mapping[str, Any]) -> Layout:
    """Shape, dtype, chunks and attributes of the result."""
    problem = plan.problem
    names = out_dimensions(problem)
    return Layout(problem.out_shape, problem.out_dtype, plan.out_chunk_rows, attributes, problem.given, names)


def _warn_of_space(plan: Plan, paths: ResultPaths) -> None:
    """Say so where the disk has no room for the result now: others may make some while the run computes."""
    if paths.stored is not None:
        return
    needed, free = math.ceil(plan.link("write").amount), free_disk(paths.state)
    if needed > free:
        logger.warning(
            "%s: the result takes %s and %s is free on its disk: make room, or the run ends before it is complete",
            paths.result,
            format_bytes(needed),
            format_bytes(free),
        )


def _decided(plan: Plan) -> dict[str, Any]:
    """What a result says of its plan."""
    names = (
        "digest",
        "decomposition",
        "query_chunks",
        "chunks",
        "span",
        "chunk_rows",
        "key_chunk_rows",
        "out_chunk_rows",
        "kernel",
        "rounds_weights",
    )
    return {name: getattr(plan, name) for name in names} | {"device_memory": plan.pins.device_memory}
