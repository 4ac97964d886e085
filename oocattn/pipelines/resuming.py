"""Checks whether an unfinished run is the one that is asked for, and can be resumed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from oocattn.errors import BudgetError, IntegrityError, ResultExistsError
from oocattn.pipelines.run import Run
from oocattn.planning.candidates import Choices
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.records import differences
from oocattn.storage.inputs.dataset import Dataset, check_poses
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.locations import Location
from oocattn.units import format_bytes
from oocattn.version import versions


def check_asked(run: Run, problem: Problem, dataset: Dataset) -> None:
    """Raise ResultExistsError where it is another problem's, dataset's or version's, IntegrityError where the dataset
    has changed since."""
    _check_same(run, "problem", run.plan.problem, problem)
    _check_same(run, "dataset", run.header.dataset.location, dataset.location)
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
        raise ResultExistsError(
            f"{run.journal.state} holds an unfinished run of another {name} ({differences(found, asked)}): finish that "
            "one with `oocattn resume` (--dataset says where its dataset is now), choose another path, or begin again "
            "with overwrite=True (--overwrite)"
        )


def _check_unchanged(run: Run, dataset: Dataset, named: bool) -> None:
    """Raise IntegrityError where the dataset has changed; one that was `named` may be a copy."""
    changed = changed_arrays(run.header.dataset.fingerprint, dataset.as_found.recorded)
    if changed:
        raise IntegrityError(
            f"{dataset.location}: {changed} of the dataset changed (metadata, size, time or content of chunks) since "
            f"the run in {run.journal.state} began, so it cannot be resumed: begin again with overwrite=True "
            "(--overwrite)"
        )
    replaced = "" if named else changed_arrays(run.header.dataset.within_run, dataset.as_found.within_run)
    if replaced:
        raise IntegrityError(
            f"{dataset.location}: files of {replaced} of the dataset were replaced or written (change time) "
            f"since the run in {run.journal.state} began, though size, time and samples are the same: if their content "
            "is, say so by naming it with `oocattn resume --dataset`; else begin again with overwrite=True (--overwrite)"
        )


def check_chosen(run: Run, choices: Choices) -> None:
    """Raise BudgetError where its plan needs more memory than is given now, ResultExistsError where it is another plan
    than is chosen now."""
    plan, place = run.plan, run.journal.state
    budgets = {
        "host memory": (plan.peak_host, choices.host_memory),
        "device memory": (plan.peak_device, choices.device_memory),
    }
    for name, (needed, budget) in budgets.items():
        if budget is not None and budget < needed:
            raise BudgetError(
                f"the unfinished run in {place} takes {format_bytes(needed)} of {name}, more than "
                f"{format_bytes(budget)}: resume it with so much, or begin again with overwrite=True (--overwrite)"
            )
    for name in ("chunks", "decomposition", "kernel", "checkpoint_seconds"):
        found, chosen = getattr(plan, name), getattr(choices, name)
        if chosen not in (None, "auto", found):
            raise ResultExistsError(
                f"the unfinished run in {place} has {name.replace('_', ' ')} {found}, not {chosen}: resume it as it is, "
                "or begin again with overwrite=True (--overwrite)"
            )


def check_plan(run: Run, plan: Plan) -> None:
    """Raise ResultExistsError where this plan would not give the same result bit for bit."""
    if plan.digest != run.plan.digest:
        raise ResultExistsError(
            f"{run.journal.state} holds an unfinished run of another plan ({_plan_differences(run.plan, plan)}): "
            "resume it with `oocattn resume`, or begin again with overwrite=True (--overwrite)"
        )


def check_bits(run: Run, computing: Mapping[str, str], accept: bool) -> str:
    """What computes otherwise now than when it began, in words; "" where nothing does.

    `computing` is what `arithmetic.describe_arithmetic` says of the workers. Raises ResultExistsError for a difference
    that is not to be accepted: the result would not have the bits that either alone would give.
    """
    before = {name: run.header.versions.get(name, "unknown") for name in computing}
    changed = [name for name, found in computing.items() if before[name] != found]
    others = [
        "other bits of a test call" if name == "arithmetic" else f"{name} {before[name]}, now {computing[name]}"
        for name in changed
    ]
    if others and not accept:
        raise ResultExistsError(
            f"the unfinished run in {run.journal.state} was begun with {'; '.join(others)}: its result would not be "
            "the same bit for bit; resume it where it began, or accept that with `oocattn resume --accept-other-bits` "
            "(accept_other_bits=True)"
        )
    return "; ".join(others)


def open_dataset(run: Run, named: Location | None) -> Dataset:
    """The dataset that it reads, at the place that is named, else where its journal says, if that is a local path.

    Raises IntegrityError where it is elsewhere, or has changed since, and ProblemError where it is not there.
    """
    dataset = Dataset.open_recorded(run.header.dataset.location, named)
    check_poses(dataset, run.plan.problem, "run")
    _check_same(run, "oocattn", run.header.versions.get("oocattn"), versions()["oocattn"])
    dataset.check_complete()
    _check_unchanged(run, dataset, named is not None)
    return dataset


def _plan_differences(before: Plan, now: Plan) -> str:
    return differences({**asdict(before.problem), **before.decisions}, {**asdict(now.problem), **now.decisions})


def result_differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In what a result that records this differs from one that is asked for, both as `describe` says; "" in nothing."""
    problem = differences(recorded.get("problem"), asked["problem"])
    found = [f"its problem differs: {problem}"] if problem else []
    source, dataset = recorded.get("dataset"), asked["dataset"]
    source = source if isinstance(source, Mapping) else {}
    if source.get("location") != dataset["location"]:
        found.append(f"its dataset differs: {differences(source.get('location'), dataset['location'])}")
    changed = changed_arrays(str(source.get("fingerprint")), dataset["fingerprint"])
    if changed:
        found.append(f"its dataset differs: {changed} not the same in metadata, size, time or content of chunks")
    return "; ".join(found)


def describe(problem: Problem, dataset: Dataset) -> dict[str, Any]:
    """What a result is the answer to."""
    return {
        "problem": asdict(problem),
        "dataset": {"location": dataset.location, "fingerprint": dataset.as_found.recorded},
    }
