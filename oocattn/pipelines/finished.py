"""What of a run is on disk already: finished query chunks as the journal records them, and partials.

A record is made when a chunk is written, validated when it is read, and compared with the result as a run is resumed. The
checksums of the whole result are gathered from all records.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oocattn.naming import by_face, setting
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.pipelines.schedule import CompletedWork
from oocattn.planning.plan import Plan
from oocattn.records import Count, from_json
from oocattn.storage.files.operations import shows_damage, words_of
from oocattn.storage.journal.blocks import is_whole
from oocattn.storage.journal.journal import ChunkId, Journal
from oocattn.storage.results.checksums import DIGITS, Checksums, Digits
from oocattn.units import ceil_div, format_seconds

if TYPE_CHECKING:
    from oocattn.storage.results.arrays import ResultArrays, WrittenChunk

NAMES = ("out", "lse")

COMPARE_SECONDS = 10.0
"""For which the checksums of finished chunks are compared before a run goes on, unless all are to be."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class FinishedChunk:
    """The record of a chunk: counts, as `RunReport` has them of a run, and the bytes and checksums that were written."""

    pairs: Count
    rows_without_keys: Count
    not_finite: Count
    out_not_finite: Count
    out_overflowed: Count
    out_underflowed: Count
    bytes: Count
    out: Digits
    lse: Digits

    def digits(self, name: str, number: int) -> str:
        """The checksum of a part of `out` or `lse`, in the order in which parts are written."""
        text: str = getattr(self, name)
        return text[DIGITS * number : DIGITS * (number + 1)]


@dataclass(frozen=True)
class Compared:
    """How many chunks were finished before a run went on, were compared by checksums, and did not match."""

    finished: int = 0
    compared: int = 0
    damaged: int = 0


NOTHING_FINISHED = Compared()


def record_of(counts: Mapping[str, Any], parts: Sequence[WrittenChunk]) -> FinishedChunk:
    """The record of a chunk with these counts, whose parts are in the order of their rows and then of the heads."""
    checksums: dict[str, Any] = {name: "".join(getattr(part, name) for part in parts) for name in NAMES}
    return FinishedChunk(**counts, bytes=sum(part.nbytes for part in parts), **checksums)


def finished_chunks(plan: Plan, journal: Journal) -> dict[ChunkId, FinishedChunk]:
    """The records of a run's finished chunks; what is not a record of one of the plan's chunks counts for nothing."""
    found = {}
    for (head_group, chunk), content in journal.finished().items():
        with suppress(ValueError):
            record = from_json(FinishedChunk, content)
            if head_group in range(plan.problem.head_groups) and chunk in range(plan.query_chunks):
                heads = len(plan.problem.head_group(head_group).outputs)
                parts = ceil_div(len(plan.query_rows(chunk)), plan.out_chunk_rows) * heads
                if len(record.out) == len(record.lse) == DIGITS * parts:
                    found[head_group, chunk] = record
    return found


def is_written(plan: Plan, result: ResultArrays, head_group: int, chunk: int) -> bool:
    """Whether the files of a chunk are in the result, as long as they must be."""
    return all(result.has(*part) for part in _parts(plan, head_group, chunk))


def compare_finished(
    plan: Plan, result: ResultArrays, journal: Journal, seconds: float, is_enough: Callable[[], bool]
) -> Compared:
    """Compare the checksums of finished chunks, those written last first, for so many seconds, or until that is enough.

    What does not match, or is lost, is removed from the result, so that it is computed again. Raises OSError where neither
    is known.
    """
    records = finished_chunks(plan, journal)
    listed = result.listed() if records else result
    finished = {place: record for place, record in records.items() if is_written(plan, listed, *place)}
    began = time.monotonic()
    compared = damaged = 0
    for place, record in sorted(finished.items(), reverse=True):
        if time.monotonic() - began > seconds or is_enough():
            break
        compared += 1
        try:
            wrong = "" if _matches(plan, result, place, record) else "is not as it was written"
        except OSError as error:
            if not shows_damage(error):
                raise
            wrong = f"is not known to be as it was written ({words_of(error)})"
        if wrong:
            damaged += 1
            logger.warning("chunk %d of head group %d %s: computed again", place[1], place[0], wrong)
            for part in _parts(plan, *place):
                result.remove(*part)
    if compared < len(finished):
        logger.warning(
            "the checksums of %d of %d finished chunks were compared in %s; %s compares all, and so does %s in the end",
            *(compared, len(finished), format_seconds(time.monotonic() - began), setting("check_finished", True)),
            by_face("oocattn.verify", "`oocattn verify`"),
        )
    return Compared(len(finished), compared, damaged)


def _matches(plan: Plan, result: ResultArrays, place: ChunkId, record: FinishedChunk) -> bool:
    for number, part in enumerate(_parts(plan, *place)):
        found = result.checksums(*part)
        if any(found[name] != record.digits(name, number) for name in NAMES):
            return False
    return True


def gather_checksums(plan: Plan, finished: Mapping[ChunkId, FinishedChunk]) -> dict[str, Checksums]:
    """The checksums of `out` and `lse`. Raises RuntimeError where that of a part is missing."""
    problem = plan.problem
    parts = ceil_div(problem.out_rows, plan.out_chunk_rows)
    gathered = {}
    for name in NAMES:
        found = [""] * (problem.batch * problem.out_heads * parts)
        for (head_group, chunk), record in finished.items():
            for number, (batch, head, part) in enumerate(_parts(plan, head_group, chunk)):
                found[(batch * problem.out_heads + head) * parts + part] = record.digits(name, number)
        checksums = Checksums(plan.out_chunk_rows, "".join(found))
        if len(checksums) != len(found):
            missing = found.index("")
            raise RuntimeError(
                f"no checksum of part {missing % parts} of head {missing // parts} of {name}: this is a defect"
            )
        gathered[name] = checksums
    return gathered


def _parts(plan: Plan, head_group: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """The (batch, head, part) of a chunk, in the order in which they are written."""
    group, rows = plan.problem.head_group(head_group), plan.out_rows(chunk)
    for start in range(rows.start, rows.stop, plan.out_chunk_rows):
        for head in group.outputs:
            yield group.batch, head, start // plan.out_chunk_rows


@dataclass(frozen=True)
class ScanResult:
    """What is done, the files of partials that serve nothing, and how many of those and of records are `damaged` by their
    own word, or `torn` by their checksums, if those were compared."""

    done: CompletedWork
    useless: tuple[Path, ...]
    damaged: int
    torn: int = 0


def scan_completed(
    plan: Plan, journal: Journal, scratch: Path, result: ResultArrays | None = None, *, thorough: bool = False
) -> ScanResult:
    """Look at the journal, at what partials say of themselves, and at whether the `result` has what the journal says.

    Without a `result` the journal and the partials are believed, also of sums over rows, which are many files. Whether
    partials are whole shows when they are read, or here if the search is `thorough`.
    """
    files, asked = PartialFiles(scratch, journal.run), plan.problem.second_pass
    summed = result is not None and asked is not None and asked.has_sums
    chunks = {place for place in finished_chunks(plan, journal) if not summed or _has_sums(plan, files, *place)}
    if result is not None and chunks:
        listed = result.listed()
        chunks = {place for place in chunks if is_written(plan, listed, *place)}
    partials: set[tuple[int, int, int]] = set()
    useless, damaged, torn = [], journal.records - len(chunks), 0
    for path, partial in files.scan():
        if (
            partial is None
            or not _fits(plan, partial)
            or (summed and not _has_sums(plan, files, partial.head_group, partial.chunk, partial))
        ):
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


def _has_sums(plan: Plan, files: PartialFiles, head_group: int, chunk: int, partial: PartialId | None = None) -> bool:
    """Whether what was summed over the rows of a chunk is there, of all its contributors or of those in a partial."""
    of = plan.division_of(head_group).contributors(chunk) if partial is None else partial.subproblems
    return all(files.has_sums(PartialId(head_group, chunk, (index,))) for index in of)


def _fits(plan: Plan, partial: PartialId) -> bool:
    """Whether the plan has such a partial: on disk of one contributor of the chunk, in memory of its first ones."""
    if partial.head_group not in range(plan.problem.head_groups) or partial.chunk not in range(plan.query_chunks):
        return False
    contributors = plan.division_of(partial.head_group).contributors(partial.chunk)
    if plan.partials == "disk":
        return len(partial.subproblems) == 1 and partial.subproblems[0] in contributors
    return partial.subproblems == contributors[: len(partial.subproblems)]
