"""The record of a run, and the header of its journal, from which it is read. Reading needs neither PyTorch nor Zarr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from oocattn.errors import IntegrityError
from oocattn.kernels.registry import device_type, get_kernel
from oocattn.naming import setting
from oocattn.pipelines.finished import NOTHING_FINISHED, Compared
from oocattn.planning.plan import Plan
from oocattn.planning.stored_plan import read_plan
from oocattn.problem.calls import ScratchBytes
from oocattn.records import ADDED, Range, Seconds, from_json, to_json
from oocattn.storage.inputs.origin import Origin, check_origins
from oocattn.storage.journal.journal import Journal, identity, read_header
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arguments import read_given
from oocattn.version import versions

if TYPE_CHECKING:
    from oocattn.storage.inputs.dataset import Dataset
    from oocattn.storage.results.arrays import ResultArrays
    from oocattn.storage.results.growing import GrowingResult, RunState

FORMAT = 11
"""Of the journal and of what lies beside it; another one is not resumed. 3: machine and inputs of the plan, the name of the
growing result, what computes. 4: what the dtype of `out` made Inf or 0. 5: the sum of the attended keys' indices. 6: the
cost of small work on a CPU. 7: queries and keys apart, masks and scores of every kind. 8: tensors that lie apart. 9 to
11: costs on a GPU."""


@dataclass(frozen=True)
class DatasetIdentity:
    """Where the dataset of a run is, and its fingerprints when the run began: also that which no copy shares.

    `tensors` says where each tensor lies, unless all are in the group at `location`. `samples` are of their numbers.
    """

    location: str
    tensors: Mapping[str, Origin]
    fingerprint: str
    within_run: str
    samples: Annotated[str, ADDED] = ""

    def __post_init__(self) -> None:
        check_origins(self.tensors)


@dataclass(frozen=True)
class Header:
    """What the journal of a run says besides the plan.

    `begun` is in seconds since the epoch, `result` the name under which its result grows, `replaces` the identity of the
    result that it is to replace, and `versions` those of what it computes with.
    """

    format: Annotated[int, Range(FORMAT, FORMAT)]
    begun: Seconds
    dataset: DatasetIdentity
    versions: Mapping[str, str]
    result: str
    replaces: str | None


@dataclass(frozen=True)
class Run:
    """A run to a result, from its beginning or as its journal tells: what driver, engine and lanes share.

    `paths` are those of the result and of the job state beside it. `plan` says what is computed and how, `header` what else
    the journal says of the run, and `journal` records what is finished. `opened` is the dataset, and `compared` says which
    finished chunks were compared with their checksums as the run was resumed. `computing` is what its workers compute with.

    It is small, and can be sent to workers. One that is only read has no `opened` dataset, and a journal without a claim.
    """

    paths: ResultPaths
    plan: Plan
    header: Header
    journal: Journal
    opened: Dataset | None = None
    compared: Compared = NOTHING_FINISHED
    computing: Mapping[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> Dataset:
        """The dataset that is read."""
        if self.opened is None:
            raise ValueError("the run was read from its journal: expected one with an open dataset")
        return self.opened

    @cached_property
    def growing(self) -> GrowingResult:
        """The result that is not complete yet."""
        from oocattn.storage.results.growing import GrowingResult
        from oocattn.storage.results.publishing import chunks_of

        return GrowingResult(
            self.paths.state / self.header.result, self.header.replaces, chunks_of(self.paths, self.journal.claim)
        )

    @property
    def result(self) -> ResultArrays:
        """The arrays of the growing result."""
        return self.growing.arrays

    def elsewhere(self, folder: Path) -> Run:
        """The run as a worker has it that shares no folder with the driver: job state passes through a new `folder`.

        Raises ValueError where job state is not kept in the store.
        """
        from oocattn.storage.results.locking import claim_elsewhere

        if self.journal.mirror is None or self.journal.claim is None:
            raise ValueError("the job state of the run is not kept in the store: expected one that is")
        mirror = replace(self.journal.mirror, folder=folder, passing=True)
        mirror.begin_elsewhere(self.header.result)
        journal = replace(self.journal, state=folder, claim=claim_elsewhere(self.journal.claim), mirror=mirror)
        return replace(self, paths=replace(self.paths, state_folder=folder), journal=journal)

    @property
    def state(self) -> RunState:
        """The places of the result, in the hands of this run."""
        from oocattn.storage.results.growing import RunState

        if self.journal.claim is None:
            raise ValueError("the run was read from its journal: expected one under a lock")
        return RunState(self.paths, self.journal.claim)


def begin_run(state: RunState, plan: Plan, dataset: Dataset, growing: GrowingResult, computing: Mapping[str, str]) -> Run:
    """Begin the journal of a run that computes with `computing`, into a result that has begun to grow."""
    found = dataset.as_found
    source = DatasetIdentity(dataset.location, dataset.origins, found.recorded, found.within_run, dataset.samples)
    header = Header(FORMAT, time.time(), source, {**versions(), **computing}, growing.name, growing.replaces)
    journal = Journal.begin(state.paths.state, {**to_json(header), "plan": to_json(plan)}, state.claim, state.paths.mirror)
    return Run(state.paths, plan, header, journal, dataset, computing=computing)


def find_unfinished(paths: ResultPaths, *, recost: bool = True) -> Run | None:
    """Read the record of the unfinished run to this result; None where there is none.

    Without `recost` the predictions of the plan are believed: computing them again takes the kernel, and with it PyTorch.
    Raises IntegrityError for a journal that is damaged.
    """
    header, path = read_header(paths.state), paths.unfinished
    if header is None or (path is None and "result" in header):
        return None
    run = identity(header)
    try:
        if path is None:
            raise ValueError("it does not name its result")
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r:.20}, expected {FORMAT}")
        plan = read_plan(header.pop("plan", None), _scratch_of if recost else None, partial(read_given, path))
        found = from_json(Header, header)
    except (ArithmeticError, ValueError) as error:
        raise IntegrityError(
            f"{paths.state}: not the journal of a run that can be resumed ({error}): begin again with "
            f"{setting('overwrite', True)}"
        ) from error
    return Run(paths, plan, found, Journal(paths.state, run, mirror=paths.mirror))


def _scratch_of(kernel: str, device: str) -> ScratchBytes:
    if device_type(kernel) != device:
        raise ValueError(f"kernel {kernel} is not for {device}")
    return get_kernel(kernel).scratch_bytes
