"""The public function `status`: it reads JSON alone, so that it answers at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from oocattn.pipelines.finished import scan_completed
from oocattn.pipelines.run import find_unfinished
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.watch.status import Status, as_planned, read_status
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.summary import read_summary


def status(result: str | Path) -> Status:
    """How far the run to `result` is: from any process, whether or not a run is alive.

    Of a finished result it says what the certificate beside it says, if that is of this very result. Raises IntegrityError,
    with what to do, where the run's own files are damaged and no result is there.
    """
    paths = ResultPaths.at(result)
    found = read_status(paths)
    if found.state == "finished":
        certificate = read_summary(paths)
        if certificate is None:
            return found
        return replace(found, certificate=certificate.outcome, verdict=f"{certificate.made}: {certificate.verdict}")
    known = found.state == "none" or (found.state == "running" and found.subproblems)
    begun = None if known else find_unfinished(paths, recost=False)
    if begun is None:
        return found
    done = scan_completed(begun.plan, begun.journal, paths.scratch).done
    return as_planned(found, begun.plan, Schedule(begun.plan, 1, done).left)
