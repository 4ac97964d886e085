"""The checksums of a result are those of its chunks in the order of the array, whatever the order of their records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import GENEROUS, GPU, Unlocked, a_problem

from oocattn.pipelines.finished import finished_chunks, gather_checksums, record_of
from oocattn.planning.candidates import make_plan
from oocattn.planning.plan import Plan
from oocattn.records import to_json
from oocattn.storage.journal.journal import Journal
from oocattn.storage.results.arrays import WrittenChunk

PROBLEM = a_problem(170, batch=2, query_heads=4, kv_heads=2)

NO_COUNTS = dict.fromkeys(
    ("pairs", "rows_without_keys", "not_finite", "out_not_finite", "out_overflowed", "out_underflowed"), 7
)


@pytest.fixture
def plan() -> Plan:
    """Of chunks of 30 tokens, in parts of 10; the last has 20 tokens, and a seventh none."""
    plan = make_plan(PROBLEM, GPU, device_memory=GENEROUS, host_memory=GENEROUS, chunks=7)
    return replace(plan, chunk_rows=30, out_chunk_rows=10)


def digits(batch: int, head: int, part: int, name: str) -> str:
    return f"{batch}{head}{part:02}{'abcd' if name == 'out' else 'cdef'}"


def finish_all(plan: Plan, journal: Journal) -> None:
    for place in reversed([(group, chunk) for group in range(4) for chunk in range(6)]):
        head_group, tokens = plan.problem.head_group(place[0]), plan.query_rows(place[1])
        parts = [
            WrittenChunk(1, *(digits(head_group.batch, head, start // 10, name) for name in ("out", "lse")))
            for start in range(tokens.start, tokens.stop, 10)
            for head in head_group.query_heads
        ]
        journal.finish(*place, to_json(record_of(NO_COUNTS, parts)))


def test_checksums_of_chunks_are_gathered_in_c_order(plan: Plan, tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, {}, Unlocked())
    finish_all(plan, journal)
    finished = finished_chunks(plan, journal)
    assert len(finished) == 24
    assert sum(record.bytes for record in finished.values()) == 2 * 4 * 17
    found = gather_checksums(plan, finished)
    for name in ("out", "lse"):
        expected = [digits(batch, head, part, name) for batch in range(2) for head in range(4) for part in range(17)]
        assert [found[name][part] for part in range(len(found[name]))] == expected
        assert found[name].rows == 10


def test_a_missing_one_is_no_silent_gap(plan: Plan, tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, {}, Unlocked())
    finish_all(plan, journal)
    finished = finished_chunks(plan, journal)
    del finished[3, 4]
    with pytest.raises(RuntimeError, match="no checksum of part 12 of head 6 of out"):
        gather_checksums(plan, finished)


@pytest.mark.parametrize("place", [(4, 0), (0, 7), (0, 6), (3, 5)])
def test_a_record_of_no_chunk_of_the_plan_counts_for_nothing(plan: Plan, tmp_path: Path, place: tuple[int, int]) -> None:
    """Nor one with the parts of another chunk: the last one has fewer."""
    journal = Journal.begin(tmp_path, {}, Unlocked())
    journal.finish(*place, to_json(record_of(NO_COUNTS, [WrittenChunk(1, "0" * 8, "1" * 8)] * 6)))
    assert finished_chunks(plan, journal) == {}
    journal.finish(1, 2, to_json(record_of(NO_COUNTS, [WrittenChunk(1, "0" * 8, "1" * 8)] * 6)))
    assert finished_chunks(plan, journal).keys() == {(1, 2)}
