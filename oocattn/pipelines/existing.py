"""What is at the path of a result already: the finished result, an unfinished run to it, nothing, or something else."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import zarr

from oocattn.errors import IntegrityError, LockedError, ResultExistsError
from oocattn.pipelines.resuming import check_asked, describe, result_differences
from oocattn.pipelines.run import Run, find_unfinished
from oocattn.pipelines.watch.report import RunReport
from oocattn.pipelines.watch.status import read_report
from oocattn.problem.problem import Problem
from oocattn.storage.files.folders import is_folder, is_taken
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import RunState, is_untidy
from oocattn.storage.results.summary import Summary, read_summary

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
    if _is_finished(paths, problem, dataset, request.overwrite):
        return Found.FINISHED
    run = None if request.overwrite else find_unfinished(paths)
    if run is None:
        return Found.NOTHING
    check_asked(run, problem, dataset)
    return run


def _is_finished(paths: ResultPaths, problem: Problem, dataset: Dataset, overwrite: bool) -> bool:
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
