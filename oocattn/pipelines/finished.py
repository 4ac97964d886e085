"""What the journal records of a finished query chunk: made when it is written, validated when it is read back, compared with
the result as a run is resumed, and the checksums of the whole result gathered from all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oocattn.planning.plan import Plan
from oocattn.storage.files.operations import words_of
from oocattn.storage.journal.journal import Journal, Place
from oocattn.storage.results.arrays import ResultArrays, WrittenChunk
from oocattn.storage.results.checksums import Checksums, are_digits
from oocattn.units import format_seconds

NAMES = ("out", "lse")

COUNTS = ("pairs", "not_finite", "out_not_finite", "out_overflowed", "out_underflowed")
"""Of a finished chunk, as `RunReport` has them of a run."""

COMPARE_SECONDS = 10.0
"""For which the checksums of finished chunks are compared before a run goes on, unless all are to be."""

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Compared:
    """How many chunks were finished before a run went on, of how many of them the checksums were compared, and how many did
    not match and are computed again."""

    finished: int = 0
    compared: int = 0
    damaged: int = 0


NOTHING_FINISHED = Compared()


def record_of(counts: Mapping[str, int], parts: Sequence[WrittenChunk]) -> dict[str, Any]:
    """The record of a chunk: its `COUNTS`, and what was written.

    Parts are in the order of their rows and then of the heads.
    """
    checksums = {name: "".join(getattr(part, name) for part in parts) for name in NAMES}
    return {**counts, "bytes": sum(part.nbytes for part in parts), **checksums}


def finished_chunks(plan: Plan, journal: Journal) -> dict[Place, dict[str, Any]]:
    """The records of a run's finished chunks; what is not a record of one of the plan's chunks counts for nothing."""
    return {place: record for place, record in journal.finished().items() if _is_record(plan, place, record)}


def is_written(plan: Plan, result: ResultArrays, head_group: int, chunk: int) -> bool:
    """Whether the files of a chunk are in the result, as long as they must be."""
    heads = plan.problem.query_heads
    return all(result.has(*divmod(head, heads), part) for head, part in _parts(plan, head_group, chunk))


def compare_finished(
    plan: Plan, result: ResultArrays, journal: Journal, seconds: float, is_enough: Callable[[], bool]
) -> Compared:
    """Compare the checksums of finished chunks, those written last first, for so many seconds, or until that is enough.

    What does not match is removed from the result, so that it is computed again.
    """
    finished = {
        place: record for place, record in finished_chunks(plan, journal).items() if is_written(plan, result, *place)
    }
    began = time.monotonic()
    compared = damaged = 0
    for place, record in sorted(finished.items(), reverse=True):
        if time.monotonic() - began > seconds or is_enough():
            break
        compared += 1
        try:
            wrong = "" if _matches(plan, result, place, record) else "is not as it was written"
        except OSError as error:
            wrong = f"is not known to be as it was written ({words_of(error)})"
        if wrong:
            damaged += 1
            logger.warning("chunk %d of head group %d %s: computed again", place[1], place[0], wrong)
            for head, part in _parts(plan, *place):
                result.remove(*divmod(head, plan.problem.query_heads), part)
    if compared < len(finished):
        logger.warning(
            "the checksums of %d of %d finished chunks were compared in %s; --check-finished compares all, and so does "
            "`oocattn verify` in the end",
            *(compared, len(finished), format_seconds(time.monotonic() - began)),
        )
    return Compared(len(finished), compared, damaged)


def _matches(plan: Plan, result: ResultArrays, place: Place, record: Mapping[str, Any]) -> bool:
    for number, (head, part) in enumerate(_parts(plan, *place)):
        found = result.checksums(*divmod(head, plan.problem.query_heads), part)
        if any(found[name] != record[name][8 * number : 8 * (number + 1)] for name in NAMES):
            return False
    return True


def gather_checksums(plan: Plan, finished: Mapping[Place, Mapping[str, Any]]) -> dict[str, Checksums]:
    """The checksums of `out` and `lse`. Raises RuntimeError where that of a part is missing."""
    problem = plan.problem
    parts = -(-problem.tokens // plan.out_chunk_rows)
    gathered = {}
    for name in NAMES:
        found = [""] * (problem.batch * problem.query_heads * parts)
        for (head_group, chunk), record in finished.items():
            for place, (head, part) in enumerate(_parts(plan, head_group, chunk)):
                found[head * parts + part] = record[name][8 * place : 8 * (place + 1)]
        checksums = Checksums(plan.out_chunk_rows, "".join(found))
        if len(checksums) != len(found):
            missing = found.index("")
            raise RuntimeError(
                f"no checksum of part {missing % parts} of head {missing // parts} of {name}: this is a defect"
            )
        gathered[name] = checksums
    return gathered


def _parts(plan: Plan, head_group: int, chunk: int) -> Iterator[tuple[int, int]]:
    """The (head, counted over the batch; part) of a chunk, in the order in which they are written."""
    group, tokens = plan.problem.head_group(head_group), plan.tokens(chunk)
    for start in range(tokens.start, tokens.stop, plan.out_chunk_rows):
        for head in group.query_heads:
            yield group.batch * plan.problem.query_heads + head, start // plan.out_chunk_rows


def _is_record(plan: Plan, place: Place, record: Mapping[str, Any]) -> bool:
    head_group, chunk = place
    if head_group not in range(plan.problem.head_groups) or chunk not in range(plan.chunks):
        return False
    parts = -(-len(plan.tokens(chunk)) // plan.out_chunk_rows) * plan.problem.group_size
    counts = (record.get(name) for name in (*COUNTS, "bytes"))
    return all(type(count) is int and count >= 0 for count in counts) and all(
        are_digits(record.get(name), parts) for name in NAMES
    )
