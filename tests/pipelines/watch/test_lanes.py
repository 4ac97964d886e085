"""Lanes together: sums of memory over processes, rows one by one or their mean; board and record of an attempt agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import make_event, normal_arrays, plan_for, run_of, write_dataset

from oocattn.pipelines.watch.attempt_log import AttemptLog
from oocattn.pipelines.watch.attempts import read_attempts
from oocattn.pipelines.watch.board import Board
from oocattn.pipelines.watch.events import Memory, Span
from oocattn.pipelines.watch.lanes import MOST_LANES, LaneMemory, rows_of_lanes


def test_memory_is_the_sum_of_what_each_process_told_last() -> None:
    memory = LaneMemory()
    assert (memory.host, memory.device, memory.processes) == (0, 0, 0)
    for told in (Memory("a 1", 10, 5), Memory("b 2", 7), Memory("a 1", 3, 4)):
        memory.add(told)
    assert (memory.host, memory.device, memory.processes) == (10, 4, 2)
    memory.add(Memory("a 1", -100, 4))
    assert memory.host == 0


def test_few_lanes_have_rows_in_the_order_of_their_numbers() -> None:
    rows = rows_of_lanes({"10": {"write": np.ones(1), "read": np.ones(1)}, "9": {"compute": np.ones(1)}, "8": {}})
    assert [(lane, resource) for lane, resource, _ in rows] == [("9", "compute"), ("10", "read"), ("10", "write")]


def test_many_lanes_have_their_mean_also_over_those_without_a_resource() -> None:
    lanes = {str(number): {"read": np.array([number, 2.0])} for number in range(MOST_LANES)}
    ((lane, resource, values),) = rows_of_lanes({**lanes, "idle": {}})
    assert (lane, resource) == (f"mean of {MOST_LANES + 1} lanes", "read")
    assert values == pytest.approx([sum(range(MOST_LANES)) / 17, 32 / 17])


@pytest.mark.parametrize("lanes", [2, MOST_LANES + 1])
def test_board_and_record_of_an_attempt_have_the_same_lanes_and_memory(fast_path: Path, lanes: int) -> None:
    write_dataset(fast_path / "dataset.zarr", normal_arrays(130))
    run = run_of(fast_path, plan_for(fast_path / "dataset.zarr", chunks=3))
    log, board = AttemptLog(run), Board("result")
    events = [make_event("started", 100.0, 100.0, plan=run.plan, left=run.plan.subproblems)]
    for number in range(lanes):
        spans = (Span("compute", 100.0, 104.0), *[Span("read", 100.0, 101.0)] * (number == 0))
        given = {"worker": str(number), "spans": spans, "memory": Memory(f"host {number}", 5 + number, number)}
        events.append(make_event("attended", 100.0, 104.0, index=number % 3, **given))
    for event in [*events, make_event("failed", 104.0, 104.0, error="enough")]:
        log(event)
        board(event)
    found, shown = read_attempts(run.paths), board.record()
    assert found is not None
    over_time = found.attempts[-1].over_time
    assert over_time is not None
    kept = {(row.lane, row.resource): row.seconds / 4 for row in over_time.busy}
    assert kept == pytest.approx({(row["lane"], row["resource"]): row["share"] for row in shown["lanes"]["rows"]}, abs=1e-3)
    assert len(kept) == (lanes + 1 if lanes <= MOST_LANES else 2)
    assert (found.attempts[-1].peak_host, found.attempts[-1].peak_device) == (
        shown["memory"]["host"],
        sum(range(lanes)),
    )
