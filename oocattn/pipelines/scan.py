"""What of a run is on disk already, and need not be done again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oocattn.pipelines.finished import finished_chunks, is_written
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.schedule import CompletedWork
from oocattn.planning.plan import Plan
from oocattn.storage.journal.blocks import is_whole
from oocattn.storage.journal.journal import Journal

if TYPE_CHECKING:
    from oocattn.storage.results.arrays import ResultArrays


@dataclass(frozen=True)
class ScanResult:
    """What is done, the files of partials that serve nothing, how many of those, and of records, are damaged by their own
    word, and how many partials are by their checksums, if those were compared."""

    done: CompletedWork
    useless: tuple[Path, ...]
    damaged: int
    torn: int = 0


def scan_completed(
    plan: Plan, journal: Journal, scratch: Path, result: ResultArrays | None = None, *, thorough: bool = False
) -> ScanResult:
    """Look at the journal, at what partials say of themselves, and at whether the `result` has what the journal says.

    Whether partials are whole shows when they are read, or here if the search is `thorough`.
    """
    chunks = {place for place in finished_chunks(plan, journal) if result is None or is_written(plan, result, *place)}
    partials: set[tuple[int, int, int]] = set()
    useless, damaged, torn = [], journal.records - len(chunks), 0
    for path, partial in PartialFiles(scratch, journal.run).scan():
        if partial is None or not _fits(plan, partial):
            damaged += 1
            useless.append(path)
        elif (partial.head_group, partial.chunk) in chunks:
            useless.append(path)
        elif thorough and not is_whole(path):
            torn += 1
            useless.append(path)
        else:
            partials.update((partial.head_group, partial.chunk, index) for index in partial.subproblems)
    return ScanResult(CompletedWork(chunks, partials), tuple(useless), damaged, torn)


def _fits(plan: Plan, partial: PartialId) -> bool:
    """Whether the plan has such a partial: on disk of one contributor of the chunk, in memory of its first ones."""
    if partial.head_group not in range(plan.problem.head_groups) or partial.chunk not in range(plan.chunks):
        return False
    contributors = plan.division.contributors(partial.chunk)
    if plan.partials == "disk":
        return len(partial.subproblems) == 1 and partial.subproblems[0] in contributors
    return partial.subproblems == contributors[: len(partial.subproblems)]
