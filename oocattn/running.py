"""From a plan to a committed result: what is at its path already, its lock, a run that begins or goes on."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from oocattn.errors import IntegrityError, LockedError, ResultExistsError
from oocattn.pipelines.events import Callback
from oocattn.pipelines.report import RunReport
from oocattn.pipelines.status import StatusFile
from oocattn.plans import Plan
from oocattn.problem import Problem
from oocattn.resuming import Unfinished, begin_journal, describe, find_unfinished
from oocattn.storage.dataset import Dataset
from oocattn.storage.durable import make_durably
from oocattn.storage.lock import Lock
from oocattn.storage.result import ResultArrays, ResultPaths, read_json
from oocattn.version import versions

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Result:
    """A finished result: `out` [B, Hq, N, D] in the output's dtype, `lse` [B, Hq, N] float32, and how it came about.

    `report` is None for a result that was copied without the folder beside it.
    """

    path: Path
    out: zarr.Array[Any]
    lse: zarr.Array[Any]
    report: RunReport | None


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

    It ends by `until`, in seconds since the epoch. An unfinished run of an equal plan is resumed.
    """
    refuse_to_replace_dataset(paths, dataset)
    if is_finished(paths, plan.problem, dataset, overwrite):
        return open_result(paths.result)
    dataset.check_complete()
    make_durably(paths.state)
    with Lock(paths.lock, until):
        if is_finished(paths, plan.problem, dataset, overwrite):  # another run may have ended in between
            return open_result(paths.result)
        begun = None if overwrite else find_unfinished(paths)
        if begun is None:
            _begin(plan, dataset, paths, client, callbacks, until)
        else:
            begun.check_asked(plan.problem, dataset)
            begun.check_plan(plan)
            logger.warning("%s: going on with the unfinished run that is there, as it was planned", paths.result)
            _carry_on(begun, dataset, paths, client, callbacks, until)
    return open_result(paths.result)


def resume_run(dataset: Dataset, paths: ResultPaths, client: Client, callbacks: Sequence[Callback], until: float) -> Result:
    """Go on with the unfinished run to a result: the part of `resume` after the start of a cluster."""
    with Lock(paths.lock, until):
        begun = find_unfinished(paths)
        if begun is not None:  # else another process has finished it in between
            _carry_on(begun, dataset, paths, client, callbacks, until)
    return open_result(paths.result)


def _begin(
    plan: Plan, dataset: Dataset, paths: ResultPaths, client: Client, callbacks: Sequence[Callback], until: float
) -> None:
    """Run a plan from its beginning; the result is locked."""
    from oocattn.pipelines.attempt import Work
    from oocattn.pipelines.run import run

    identity = describe(plan.problem, dataset)
    arrays = paths.begin(**_layout(plan), attributes={**identity, "plan": _decided(plan), "versions": versions()})
    journal = begin_journal(paths, plan, identity["dataset"])
    work = Work(plan, dataset, identity["dataset"]["fingerprint"], paths, arrays, journal)
    run(work, client, (StatusFile(paths.status), *callbacks), until)


def _layout(plan: Plan) -> dict[str, Any]:
    """Shape, dtype and chunks of the result."""
    problem = plan.problem
    shape = (problem.batch, problem.query_heads, problem.tokens, problem.head_dim)
    return {"shape": shape, "dtype": problem.out_dtype, "chunk_rows": plan.out_chunk_rows}


def _decided(plan: Plan) -> dict[str, Any]:
    """What a result says of its plan."""
    names = ("digest", "decomposition", "chunks", "span", "chunk_rows", "out_chunk_rows", "kernel")
    return {name: getattr(plan, name) for name in names}


def _carry_on(
    begun: Unfinished,
    dataset: Dataset,
    paths: ResultPaths,
    client: Client,
    callbacks: Sequence[Callback],
    until: float,
) -> None:
    """Do what is left of a run; the result is locked."""
    from oocattn.pipelines.attempt import Work
    from oocattn.pipelines.run import run

    begun.warn_of_versions()
    attributes = {"problem": asdict(begun.plan.problem), "dataset": begun.dataset, "plan": _decided(begun.plan)}
    arrays = paths.resume(**_layout(begun.plan), attributes=attributes)
    work = Work(begun.plan, dataset, begun.dataset["fingerprint"], paths, arrays, begun.journal)
    run(work, client, (StatusFile(paths.status), *callbacks), until)


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
    ours = describe(problem, dataset)
    if all(found.get(name) == ours[name] for name in ours):
        tidy(paths)
        return True
    differs = next((name for name in ours if found and found.get(name) != ours[name]), "content")
    raise ResultExistsError(
        f"{paths.result} exists and is not the result of this run (its {differs} differs): choose another path, or "
        "replace it with overwrite=True (--overwrite)"
    )


def tidy(paths: ResultPaths) -> None:
    """Do what a run that was killed at its very end has left to do."""
    if paths.untidy:
        with suppress(LockedError), Lock(paths.lock):
            paths.tidy()


def refuse_to_replace_dataset(paths: ResultPaths, dataset: Dataset) -> None:
    """Raise ResultExistsError where the result's path is the dataset's, holds it, or is that of one of its arrays."""
    location, result = Path(dataset.location).resolve(), paths.result.resolve()
    inside = any(result.is_relative_to(location / name) for name in dataset.arrays)
    if "://" not in dataset.location and (inside or location.is_relative_to(result)):
        raise ResultExistsError(
            f"{paths.result} belongs to the dataset {dataset.location}: choose another path for the result"
        )


def open_result(result: str | Path) -> Result:
    """A finished result, its arrays open for reading. Raises IntegrityError where there is none."""
    paths = ResultPaths.at(result)
    if not os.path.lexists(paths.result):
        raise IntegrityError(f"{paths.result}: no finished result here; `oocattn status` says whether one is under way")
    arrays = ResultArrays.open(paths.result)
    try:
        found = read_json(paths.report)
        report = RunReport.from_json(found) if found else None
    except IntegrityError as error:  # the result is worth more
        warnings.warn(f"the report of the run cannot be read: {error}", stacklevel=2)
        report = None
    return Result(paths.result, arrays.out, arrays.lse, report)
