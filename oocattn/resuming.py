"""What the journal of an unfinished run says it works at, and whether that is what is asked for now."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from oocattn.errors import BudgetError, IntegrityError, ResultExistsError
from oocattn.plans import Plan
from oocattn.problem import Problem, make_problem
from oocattn.storage.dataset import Dataset, changed_arrays
from oocattn.storage.journal import Journal, identity, read_header
from oocattn.storage.result import ResultPaths
from oocattn.units import format_bytes, parse_duration, parse_size
from oocattn.version import versions

FORMAT = 2
"""Of the journal and of what lies beside it; another one is not resumed. 2: a fingerprint for each array of the dataset."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Choices:
    """What a user may choose of a plan."""

    device_memory: float | str | None
    host_memory: float | str | None
    chunks: int | None
    decomposition: str
    kernel: str | None
    checkpoint_interval: float | str | None

    @property
    def device_bytes(self) -> int | None:
        """The budget of device memory in bytes. Raises ProblemError for what is no size."""
        return None if self.device_memory is None else parse_size(self.device_memory, "device memory")

    @property
    def host_bytes(self) -> int | None:
        """The budget of host memory in bytes. Raises ProblemError for what is no size."""
        return None if self.host_memory is None else parse_size(self.host_memory, "host memory")

    @property
    def checkpoint_seconds(self) -> float | None:
        """What a kill may cost, 0 for whatever it costs. Raises ProblemError for what is no duration."""
        chosen = self.checkpoint_interval
        return None if chosen is None else parse_duration(chosen, "checkpoint interval")


@dataclass(frozen=True)
class Unfinished:
    """A run that was begun: its plan, the dataset that it reads, and the journal of what it has done."""

    plan: Plan
    dataset: Mapping[str, str]
    versions: Mapping[str, str]
    journal: Journal

    def check_asked(self, problem: Problem, dataset: Dataset) -> None:
        """Raise ResultExistsError where it is another problem's, dataset's or version's, IntegrityError where the dataset
        has changed since."""
        place = self.journal.state
        ours = {"problem": self.plan.problem, "dataset": self.dataset["location"], "oocattn": self.versions["oocattn"]}
        asked = {"problem": problem, "dataset": dataset.location, "oocattn": versions()["oocattn"]}
        for name, found in ours.items():
            if found != asked[name]:
                raise ResultExistsError(
                    f"{place} holds an unfinished run of another {name} ({found}, now {asked[name]}): finish that one with "
                    "`oocattn resume`, choose another path, or begin anew with overwrite=True (--overwrite)"
                )
        changed = changed_arrays(self.dataset["fingerprint"], dataset.fingerprint())
        if changed:
            raise IntegrityError(
                f"{dataset.location}: {changed} of the dataset changed (metadata, size, time or content of chunks) since "
                f"the run in {place} began, so that cannot be resumed: begin anew with overwrite=True (--overwrite)"
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
                    f"{format_bytes(budget)}: resume it with so much, or begin anew with overwrite=True (--overwrite)"
                )
        for name in ("chunks", "decomposition", "kernel", "checkpoint_seconds"):
            found, chosen = getattr(plan, name), getattr(choices, name)
            if chosen not in (None, "auto", found):
                raise ResultExistsError(
                    f"the unfinished run in {place} has {name.replace('_', ' ')} {found}, not {chosen}: resume it as it is, "
                    "or begin anew with overwrite=True (--overwrite)"
                )

    def check_plan(self, plan: Plan) -> None:
        """Raise ResultExistsError where this plan would not give the same result bit for bit."""
        if plan.digest != self.plan.digest:
            raise ResultExistsError(
                f"{self.journal.state} holds an unfinished run of another plan: resume it with `oocattn resume`, or begin "
                "anew with overwrite=True (--overwrite)"
            )

    def warn_of_versions(self) -> None:
        """Warn where it was begun with another torch: its kernels may round otherwise."""
        before, now = self.versions["torch"], versions()["torch"]
        if before != now:
            logger.warning(
                "%s: begun with torch %s, goes on with torch %s: exact all the same, but not bit for bit what either alone "
                "would have given",
                *(self.journal.state, before, now),
            )

    def open_dataset(self) -> Dataset:
        """The dataset that it reads. Raises IntegrityError where it has changed since."""
        dataset, problem = Dataset.open(self.dataset["location"]), self.plan.problem
        posed = make_problem(*dataset.specs, causal=problem.causal, scale=problem.scale, out_dtype=problem.out_dtype)
        self.check_asked(posed, dataset)
        dataset.check_complete()
        return dataset


def begin_journal(paths: ResultPaths, plan: Plan, dataset: Mapping[str, str]) -> Journal:
    """The journal of a run that begins."""
    header = {
        "format": FORMAT,
        "begun": time.time(),
        "plan": plan.to_json(),
        "dataset": dict(dataset),
        "versions": versions(),
    }
    return Journal.begin(paths.state, header)


def find_unfinished(paths: ResultPaths) -> Unfinished | None:
    """The unfinished run to this result; None where there is none. Raises IntegrityError for a journal that is damaged."""
    try:
        header = read_header(paths.state)
    except IntegrityError as error:
        raise IntegrityError(f"{error}; begin anew with overwrite=True (--overwrite)") from error
    if header is None or not paths.growing.exists():
        return None
    try:
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, expected {FORMAT}")
        dataset = {name: str(header["dataset"][name]) for name in ("location", "fingerprint")}
        plan, by = Plan.from_json(header["plan"]), {name: str(header["versions"][name]) for name in ("oocattn", "torch")}
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{paths.state}: not the journal of a run that can be resumed ({error}): begin anew with overwrite=True "
            "(--overwrite)"
        ) from error
    return Unfinished(plan, dataset, by, Journal(paths.state, identity(header)))


def describe(problem: Problem, dataset: Dataset) -> dict[str, Any]:
    """What a result is the answer to."""
    return {
        "problem": asdict(problem),
        "dataset": {"location": dataset.location, "fingerprint": dataset.fingerprint()},
    }
