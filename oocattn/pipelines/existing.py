"""What is at the path of a result already, and whether it is what is asked for.

It is the finished result, an unfinished run to it, which may be resumed here or not, nothing, or something else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from oocattn import naming
from oocattn.errors import BudgetError, IntegrityError, OocattnError, ResultExistsError
from oocattn.pipelines.replacing import (
    refuse_to_remove_what_is_computed_from,
    refuse_to_replace_dataset,
    refuse_within_result,
)
from oocattn.pipelines.result import Result
from oocattn.pipelines.run import Run, find_unfinished
from oocattn.pipelines.watch.report import read_report
from oocattn.planning.candidates import Choices
from oocattn.planning.plan import Plan
from oocattn.problem.arrays import weights_dtype
from oocattn.problem.problem import Problem
from oocattn.records import differences, to_json
from oocattn.storage.files.folders import is_folder
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.inputs.opening import InputsLike, open_again, open_inputs
from oocattn.storage.paths import ResultLike, ResultPaths
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import RunState, is_untidy
from oocattn.storage.results.locking import hold_lock, remove_state
from oocattn.storage.results.summary import ResultAttributes, read_summary
from oocattn.units import format_bytes
from oocattn.version import versions

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Request:
    """What is asked for: attention of a problem over its dataset, as a result.

    With `overwrite` it is computed again: a result that is there is replaced, and an unfinished run begun again.
    """

    problem: Problem
    dataset: Dataset
    paths: ResultPaths
    overwrite: bool = False


class Found(Enum):
    """What is there of a result, but for an unfinished run."""

    NOTHING = "nothing"
    FINISHED = "finished"


def find(request: Request) -> Run | Found:
    """Look for what is asked for: the finished result, an unfinished run to it, or nothing.

    Raises ResultExistsError where something else is there, or the result would replace its own dataset, and IntegrityError
    where the dataset has changed since the run began or the journal is damaged.
    """
    paths, problem, dataset = request.paths, request.problem, request.dataset
    refuse_to_replace_dataset(paths, dataset)
    if request.overwrite:
        refuse_to_remove_what_is_computed_from(paths, dataset)
    finished = paths.attributes()
    if finished is not None and "problem" not in finished:
        raise ResultExistsError(
            f"{paths.result} exists and is not a result of oocattn, and only those are replaced: remove it, or choose "
            "another path"
        )
    if request.overwrite:
        return Found.NOTHING
    if finished is not None:
        if differing := result_differences(finished, describe(problem, dataset)):
            raise ResultExistsError(
                f"{paths.result} exists and is not the result of this run ({differing}): choose another path, or replace it "
                f"with {naming.setting('overwrite', True)}"
            )
        return Found.FINISHED
    run = find_unfinished(paths)
    if run is None:
        if problem.second_pass is None:  # whose result is job state of another
            refuse_within_result(paths)
        return Found.NOTHING
    check_asked(run, problem, dataset)
    return run


def finished_result(paths: ResultPaths) -> Result:
    """The finished result that is there, tidied up. A warning says where its certificate failed."""
    tidy(paths)
    found = _with_certificate(paths)
    certificate = found.certificate
    if certificate is not None and certificate.outcome == "failed":
        logger.warning(
            "%s is there, but its certificate of %s says %s; %s checks it again",
            *(paths.result, certificate.made, certificate.verdict, naming.by_face("oocattn.verify", "`oocattn verify`")),
        )
    return found


def tidy(paths: ResultPaths) -> None:
    """Do what a run that was killed at its very end has left to do; a failure costs nothing but that."""
    with suppress(OocattnError, OSError):
        if (paths.stored is not None or is_folder(paths.state)) and is_untidy(paths):
            paths.make_state()
            with hold_lock(paths) as claim:
                RunState(paths, claim).tidy()
            remove_state(paths)


def open_result(
    result: ResultLike, scratch: str | Path | None = None, storage_options: StorageOptions | None = None
) -> Result:
    """A finished result, its arrays open for reading, with its certificate. Raises IntegrityError where there is none."""
    return _with_certificate(ResultPaths.at(result, scratch, storage_options=storage_options))


def _with_certificate(paths: ResultPaths) -> Result:
    return replace(result_at(paths), certificate=read_summary(paths))


def result_at(paths: ResultPaths) -> Result:
    """The finished result at these places. Raises as `open_result`."""
    if not paths.is_taken():
        asked = naming.by_face("oocattn.status", "`oocattn status`")
        raise IntegrityError(f"{paths.result}: no finished result here; {asked} says whether one is under way")
    arrays = ResultArrays.open(paths.result)
    try:
        report = read_report(paths)
    except IntegrityError as error:  # the result is worth more
        logger.warning("the report of the run cannot be read: %s", error)
        report = None
    place = str(paths.result) if paths.stored is not None else paths.folder
    return Result(place, arrays.out, arrays.lse, report)


def check_asked(run: Run, problem: Problem, dataset: Dataset) -> None:
    """ResultExistsError for a run of another problem, dataset or version, IntegrityError where the dataset has changed."""
    _check_same(run, "problem", run.plan.problem, problem)
    _check_same(run, "dataset", run.header.dataset.location, dataset.location)
    _check_same(run, "dataset", run.header.dataset.tensors, dataset.origins)
    _check_same(run, "oocattn", run.header.versions.get("oocattn"), versions()["oocattn"])
    _check_unchanged(run, dataset, named=False)


def check_run(run: Run, asked: Run) -> None:
    """Raise ResultExistsError where this is another run than the one that is asked for."""
    if run.journal.run != asked.journal.run:
        raise ResultExistsError(
            f"{run.journal.state} holds another run than when the command began "
            f"({_plan_differences(asked.plan, run.plan) or 'begun again'}): resume again to go on with that one"
        )


def _check_same(run: Run, name: str, found: object, asked: object) -> None:
    if found != asked:
        raise _is_another(run, name, differences(found, asked))


def _is_another(run: Run, name: str, differing: str) -> ResultExistsError:
    return ResultExistsError(
        f"{run.journal.state} holds an unfinished run of another {name} ({differing}): finish that one with "
        f"resume ({naming.named('inputs')} says where its dataset is now), choose another path, or begin again "
        f"with {naming.setting('overwrite', True)}"
    )


def _check_unchanged(run: Run, dataset: Dataset, named: bool) -> None:
    """Raise IntegrityError where the dataset has changed; one that was `named` may be a copy."""
    changed = changed_arrays(run.header.dataset.fingerprint, dataset.as_found.recorded)
    if changed:
        raise IntegrityError(
            f"{dataset.location}: {changed} of the dataset changed (metadata, size, time or content of chunks) since "
            f"the run in {run.journal.state} began, so it cannot be resumed: begin again with "
            f"{naming.setting('overwrite', True)}"
        )
    replaced = "" if named else changed_arrays(run.header.dataset.within_run, dataset.as_found.within_run)
    if replaced:
        raise IntegrityError(
            f"{dataset.location}: files of {replaced} of the dataset were replaced or written (change time) "
            f"since the run in {run.journal.state} began, though size, time and samples are the same: if their content "
            f"is, say so by naming it with {naming.named('inputs')} of `resume`; else begin again with "
            f"{naming.setting('overwrite', True)}"
        )


def check_chosen(run: Run, choices: Choices) -> None:
    """BudgetError where its plan needs more memory than is given now, ResultExistsError where it is not as chosen now."""
    plan, place = run.plan, run.journal.state
    budgets = {
        "host memory": (plan.peak_host, choices.host_memory),
        "device memory": (plan.peak_device, choices.device_memory),
    }
    for name, (needed, budget) in budgets.items():
        if budget is not None and budget < needed:
            raise BudgetError(
                f"the unfinished run in {place} takes {format_bytes(needed)} of {name}, more than "
                f"{format_bytes(budget)}: resume it with so much, or begin again with {naming.setting('overwrite', True)}"
            )
    for name in ("chunks", "decomposition", "kernel", "checkpoint_seconds"):
        found, chosen = getattr(plan, name), getattr(choices, name)
        if chosen not in (None, "auto", found):
            raise ResultExistsError(
                f"the unfinished run in {place} has {name.replace('_', ' ')} {found}, not {chosen}: resume it as it is, "
                f"or begin again with {naming.setting('overwrite', True)}"
            )
    if choices.precise and plan.weights_dtype != "float32":
        raise ResultExistsError(
            f"the unfinished run in {place} {_rounding(plan.kernel, plan.weights_dtype)}: resume it without "
            f"{naming.named('precise')}, or begin again with {naming.setting('overwrite', True)}"
        )


def check_precise(paths: ResultPaths) -> None:
    """Raise ResultExistsError where a kernel that rounds softmax weights computed the finished result."""
    found = ResultAttributes.read(paths)
    weights = weights_dtype(found.problem.dtype, found.plan.rounds_weights)
    if weights != "float32":
        raise ResultExistsError(
            f"{paths.result} exists and {_rounding(found.plan.kernel, weights)}: ask for it without "
            f"{naming.named('precise')}, choose another path, or replace it with {naming.setting('overwrite', True)}"
        )


def _rounding(kernel: str, weights: str) -> str:
    return f"is of kernel {kernel}, which rounds softmax weights to {weights}, and not precise"


def check_plan(run: Run, plan: Plan) -> None:
    """Raise ResultExistsError where this plan would not give the same result bit for bit."""
    if plan.digest != run.plan.digest:
        raise _is_another(run, "plan", _plan_differences(run.plan, plan))


def check_bits(run: Run, computing: Mapping[str, str], accept: bool) -> str:
    """What computes otherwise now than when it began, in words; "" where nothing does.

    Raises ResultExistsError for a difference that is not to be accepted: the result would have the bits of neither.
    """
    before = {name: run.header.versions.get(name, "unknown") for name in computing}
    words = "; ".join(
        "other bits of a test call" if name == "arithmetic" else f"{name} {before[name]}, now {found}"
        for name, found in computing.items()
        if before[name] != found
    )
    if words and not accept:
        raise ResultExistsError(
            f"the unfinished run in {run.journal.state} was begun with {words}: its result would not be the same bit for "
            "bit; resume it where it began, or accept that with `resume` and "
            f"{naming.setting('accept_other_bits', True)}"
        )
    return words


def open_dataset(run: Run, named: InputsLike | None, storage_options: StorageOptions | None = None) -> Dataset:
    """The dataset that it reads, at the place that is named, else where its journal says, if that is a local path.

    Raises IntegrityError where it is elsewhere, or has changed since, and ProblemError where it is not there.
    """
    dataset = open_again(run.header.dataset, run.plan.problem, "run", named, storage_options)
    _check_same(run, "oocattn", run.header.versions.get("oocattn"), versions()["oocattn"])
    dataset.check_complete()
    _check_unchanged(run, dataset, named is not None)
    return dataset


def _plan_differences(before: Plan, now: Plan) -> str:
    return differences({**to_json(before.problem), **before.decisions}, {**to_json(now.problem), **now.decisions})


def check_inputs(
    paths: ResultPaths, attributes: Mapping[str, Any], named: InputsLike, storage_options: StorageOptions | None
) -> None:
    """Raise IntegrityError where a finished result is not of the inputs that are named."""
    problem, recorded = attributes.get("problem"), attributes.get("dataset")
    has_bias = isinstance(problem, Mapping) and bool(problem.get("bias_heads"))
    dataset = open_inputs(named, key_bias=has_bias, storage_options=storage_options)
    fingerprint = recorded.get("fingerprint") if isinstance(recorded, Mapping) else None
    changed = changed_arrays(str(fingerprint), dataset.as_found.recorded)
    if changed:
        raise IntegrityError(
            f"{paths.result} is finished, and not known to be of {dataset.location}: {changed} differ in metadata, size, "
            f"time or content: leave {naming.named('inputs')} out, or see with `verify` whether its rows are right for these"
        )


def result_differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In what a result that records this differs from one that is asked for, both as `describe` says; "" in nothing."""
    problem = differences(recorded.get("problem"), asked["problem"])
    found = [f"its problem differs: {problem}"] if problem else []
    source, dataset = recorded.get("dataset"), asked["dataset"]
    source = source if isinstance(source, Mapping) else {}
    for field in ("location", "tensors"):
        if source.get(field) != dataset[field]:
            found.append(f"its dataset differs: {differences(source.get(field), dataset[field])}")
    changed = changed_arrays(str(source.get("fingerprint")), dataset["fingerprint"])
    if changed:
        found.append(f"its dataset differs: {changed} not the same in metadata, size, time or content of chunks")
    return "; ".join(found)


def describe(problem: Problem, dataset: Dataset) -> dict[str, Any]:
    """What a result is the answer to."""
    return {
        "problem": to_json(problem),
        "dataset": dataset.record(),
    }
