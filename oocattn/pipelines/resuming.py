"""What the journal of an unfinished run says it works at, and whether that is what is asked for now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from oocattn import arguments
from oocattn.arguments import Duration, Size
from oocattn.errors import BudgetError, IntegrityError, ResultExistsError
from oocattn.kernels import device_type, get_kernel
from oocattn.planning.machine import ScratchBytes
from oocattn.planning.plan import Plan
from oocattn.planning.stored_plan import read_plan
from oocattn.problem.problem import Problem
from oocattn.records import Range, Seconds, differences, from_json, to_json
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.inputs.posing import check_poses
from oocattn.storage.journal.claims import Claim
from oocattn.storage.journal.journal import Journal, identity, read_header
from oocattn.storage.locations import Location
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.growing import Growing
from oocattn.units import format_bytes
from oocattn.version import versions

FORMAT = 5
"""Of the journal and of what lies beside it; another one is not resumed. 3: machine and inputs of the plan, the name of the
growing result, what computes. 4: what the dtype of `out` made Inf or 0. 5: the sum of key
indices in partials, whether the kernel rounds weights."""


@dataclass(frozen=True)
class Choices:
    """What a user may choose of a plan."""

    device_memory: Size | None
    host_memory: Size | None
    chunks: int | None
    decomposition: str
    kernel: str | None
    checkpoint_interval: Duration | None

    @property
    def device_bytes(self) -> int | None:
        """The budget of device memory in bytes. Raises ProblemError for what is no size."""
        return None if self.device_memory is None else arguments.size("device_memory", self.device_memory)

    @property
    def host_bytes(self) -> int | None:
        """The budget of host memory in bytes. Raises ProblemError for what is no size."""
        return None if self.host_memory is None else arguments.size("host_memory", self.host_memory)

    @property
    def checkpoint_seconds(self) -> float | None:
        """What a kill may cost, 0 for whatever it costs. Raises ProblemError for what is no duration."""
        chosen = self.checkpoint_interval
        return None if chosen is None else arguments.duration("checkpoint_interval", chosen)


@dataclass(frozen=True)
class DatasetIdentity:
    """Where the dataset of a run is, and its fingerprints when the run began: also that which no copy shares."""

    location: str
    fingerprint: str
    within_run: str


@dataclass(frozen=True)
class Header:
    """What the journal of a run says that it works at, besides the plan.

    `begun` is in seconds since the epoch, `result` the name under which its result grows, and `replaces` the identity of the
    result that it is to replace. `versions` are those of what it computes with.
    """

    format: Annotated[int, Range(FORMAT, FORMAT)]
    begun: Seconds
    dataset: DatasetIdentity
    versions: Mapping[str, str]
    result: str
    replaces: str | None


@dataclass(frozen=True)
class Unfinished:
    """A run that was begun: its plan, what else its journal says of it, where its result grows, and the journal."""

    plan: Plan
    header: Header
    path: Path
    journal: Journal

    def check_asked(self, problem: Problem, dataset: Dataset) -> None:
        """Raise ResultExistsError where it is another problem's, dataset's or version's, IntegrityError where the dataset
        has changed since."""
        self._check_same("problem", self.plan.problem, problem)
        self._check_same("dataset", self.header.dataset.location, dataset.location)
        self._check_same("oocattn", self.header.versions.get("oocattn"), versions()["oocattn"])
        self._check_unchanged(dataset, named=False)

    def check_run(self, asked: Unfinished) -> None:
        """Raise ResultExistsError where this is another run than the one that is asked for."""
        if self.journal.run != asked.journal.run:
            raise ResultExistsError(
                f"{self.journal.state} holds another run than when the command began "
                f"({_plan_differences(asked.plan, self.plan) or 'begun again'}): resume again to go on with that one"
            )

    def _check_same(self, name: str, found: object, asked: object) -> None:
        if found != asked:
            raise ResultExistsError(
                f"{self.journal.state} holds an unfinished run of another {name} ({differences(found, asked)}): finish that "
                "one with `oocattn resume` (--dataset says where its dataset is now), choose another path, or begin again "
                "with overwrite=True (--overwrite)"
            )

    def _check_unchanged(self, dataset: Dataset, named: bool) -> None:
        """Raise IntegrityError where the dataset has changed; one that was `named` may be a copy."""
        changed = changed_arrays(self.header.dataset.fingerprint, dataset.as_found.recorded)
        if changed:
            raise IntegrityError(
                f"{dataset.location}: {changed} of the dataset changed (metadata, size, time or content of chunks) since "
                f"the run in {self.journal.state} began, so it cannot be resumed: begin again with overwrite=True "
                "(--overwrite)"
            )
        replaced = "" if named else changed_arrays(self.header.dataset.within_run, dataset.as_found.within_run)
        if replaced:
            raise IntegrityError(
                f"{dataset.location}: files of {replaced} of the dataset were replaced or written (change time) "
                f"since the run in {self.journal.state} began, though size, time and samples are the same: if their content "
                "is, say so by naming it with `oocattn resume --dataset`; else begin again with overwrite=True (--overwrite)"
            )

    def check_chosen(self, choices: Choices) -> None:
        """Raise BudgetError where its plan needs more memory than is given now, ResultExistsError where it is another plan
        than is chosen now."""
        plan, place = self.plan, self.journal.state
        budgets = {
            "host memory": (plan.peak_host, choices.host_bytes),
            "device memory": (plan.peak_device, choices.device_bytes),
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

    def check_plan(self, plan: Plan) -> None:
        """Raise ResultExistsError where this plan would not give the same result bit for bit."""
        if plan.digest != self.plan.digest:
            raise ResultExistsError(
                f"{self.journal.state} holds an unfinished run of another plan ({_plan_differences(self.plan, plan)}): "
                "resume it with `oocattn resume`, or begin again with overwrite=True (--overwrite)"
            )

    def check_bits(self, computing: Mapping[str, str], accept: bool) -> str:
        """What computes otherwise now than when it began, in words; "" where nothing does.

        `computing` is what `arithmetic.describe_arithmetic` says of the workers. Raises ResultExistsError for a difference
        that is not to be accepted: the result would not have the bits that either alone would give.
        """
        before = {name: self.header.versions.get(name, "unknown") for name in computing}
        changed = [name for name, found in computing.items() if before[name] != found]
        others = [
            "other bits of a test call" if name == "arithmetic" else f"{name} {before[name]}, now {computing[name]}"
            for name in changed
        ]
        if others and not accept:
            raise ResultExistsError(
                f"the unfinished run in {self.journal.state} was begun with {'; '.join(others)}: its result would not be "
                "the same bit for bit; resume it where it began, or accept that with `oocattn resume --accept-other-bits` "
                "(accept_other_bits=True)"
            )
        return "; ".join(others)

    def open_dataset(self, named: Location | None) -> Dataset:
        """The dataset that it reads, at the place that is named, else where its journal says, if that is a local path.

        Raises IntegrityError where it is elsewhere, or has changed since, and ProblemError where it is not there.
        """
        dataset = Dataset.open_recorded(self.header.dataset.location, named)
        check_poses(dataset, self.plan.problem, "run")
        self._check_same("oocattn", self.header.versions.get("oocattn"), versions()["oocattn"])
        dataset.check_complete()
        self._check_unchanged(dataset, named is not None)
        return dataset


def begin_journal(
    paths: ResultPaths, plan: Plan, dataset: DatasetIdentity, growing: Growing, computing: Mapping[str, str], claim: Claim
) -> Journal:
    """The journal of a run that begins."""
    made_with = {**versions(), **computing}
    header = Header(FORMAT, time.time(), dataset, made_with, growing.name, growing.replaces)
    return Journal.begin(paths.state, {**to_json(header), "plan": plan.to_json()}, claim)


def find_unfinished(paths: ResultPaths) -> Unfinished | None:
    """The unfinished run to this result; None where there is none. Raises IntegrityError for a journal that is damaged."""
    header, path = read_header(paths.state), paths.unfinished
    if header is None or (path is None and "result" in header):
        return None
    run = identity(header)
    try:
        if path is None:
            raise ValueError("it does not name its result")
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r:.20}, expected {FORMAT}")
        plan = read_plan(header.pop("plan", None), _scratch_of)
        found = from_json(Header, header)
    except (ArithmeticError, ValueError) as error:
        raise IntegrityError(
            f"{paths.state}: not the journal of a run that can be resumed ({error}): begin again with overwrite=True "
            "(--overwrite)"
        ) from error
    return Unfinished(plan, found, path, Journal(paths.state, run))


def _scratch_of(kernel: str, device: str) -> ScratchBytes:
    if device_type(kernel) != device:
        raise ValueError(f"kernel {kernel} is not for {device}")
    return get_kernel(kernel).scratch_bytes


def _plan_differences(before: Plan, now: Plan) -> str:
    return differences({**asdict(before.problem), **before.decided}, {**asdict(now.problem), **now.decided})


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
