"""The board of a run: its record says what the events said, stays small, and can be written as JSON."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MACHINE, Recorder, a_problem, carry_out, make_event, normal_arrays, plan_for, write_dataset

from oocattn import Plan
from oocattn.division.live import LivePairs
from oocattn.pipelines.schedule import CompletedWork
from oocattn.pipelines.watch.board import MOST_LINES, Board
from oocattn.pipelines.watch.events import Memory, Span
from oocattn.pipelines.watch.lanes import MOST_LANES
from oocattn.pipelines.watch.pair_progress import MOST_CELLS, PairProgress, live_cells
from oocattn.pipelines.watch.series import MOST_BINS, MOST_INTERVALS, Busy, Covered, Rates
from oocattn.pipelines.watch.timeline import busy_seconds
from oocattn.planning.candidates import make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("board")
    write_dataset(path / "dataset.zarr", normal_arrays(130, kv_heads=2))
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return plan_for(folder / "dataset.zarr", chunks=13, causal=True)


def begun(plan: Plan, **given: Any) -> Board:
    board = Board("/somewhere/result.zarr")
    board(make_event("started", 100.0, 100.0, plan=plan, **{"left": plan.subproblems, **given}))
    return board


def test_the_record_of_a_run_is_what_its_events_said(folder: Path, plan: Plan) -> None:
    recorder, board = Recorder([]), Board("result.zarr")
    records = []

    def look(event: Any) -> None:
        recorder(event)
        board(event)
        records.append(board.record())

    report = carry_out(plan, folder / "dataset.zarr", folder / "result.zarr", callbacks=[look]).report
    last = records[-1]
    assert json.loads(json.dumps(last)) == last
    assert (last["state"], last["share"], last["seconds_left"], last["strip"]) == ("finished", 1.0, 0.0, [1.0, 1.0])
    assert last["rates"]["totals"]["pairs"] == pytest.approx(report.pairs)
    assert last["rates"]["totals"]["read"] == pytest.approx(report.bytes_read)
    assert last["rates"]["totals"]["written"] == pytest.approx(report.bytes_written)
    assert last["matrix"]["done"] == last["matrix"]["live"] == np.tri(13, dtype=int).tolist()
    assert [record["subproblems_done"] for record in records] == [
        sum(event.kind == "attended" for event in recorder.events[: number + 1]) for number in range(len(records))
    ]
    spans = [span for event in recorder.events for span in getattr(event, "spans", ()) if span.resource == "compute"]
    lanes = last["lanes"]
    (compute,) = [row for row in lanes["rows"] if row["resource"] == "compute"]
    assert lanes["seconds"] < 60  # so that no span is older
    assert compute["share"] * lanes["seconds"] == pytest.approx(busy_seconds(spans), rel=1e-3, abs=1e-3)
    assert last["memory"]["processes"] == 1


@pytest.mark.parametrize("decomposition", ["cqs", "strips"])
def test_pairs_are_done_in_flight_or_left_as_their_subproblems_are(folder: Path, decomposition: str) -> None:
    plan = plan_for(folder / "dataset.zarr", chunks=13, causal=True, decomposition=decomposition)
    division, progress = plan.division_of(1), PairProgress(plan)
    done, flying = division.indices[::3], division.indices[1::3]
    for index in [*done, *flying]:
        progress.stage(1, index)
    for index in done:
        progress.attend(1, index)
    matrix = progress.matrix()
    assert matrix["head_group"] == 1
    for query, key in product(range(plan.query_chunks), range(plan.chunks)):
        is_live = division.live.has(query, key)
        owner = division.owner(query, key) if is_live else None
        expected = (is_live, owner in done, owner in flying)
        assert tuple(matrix[name][query][key] for name in ("live", "done", "in_flight")) == expected
    assert progress.strip() == [0.0, round(len(done) / len(division.indices), 4)]


def test_what_was_done_before_is_done(plan: Plan) -> None:
    division = plan.division_of(0)
    quorum = division.subproblem(division.contributors(7)[0])
    done = CompletedWork({(0, 12)}, {(0, chunk, quorum.index) for chunk in quorum.query_chunks})
    record = begun(plan, left=plan.subproblems - 1, resumed=True, done=done).record()
    expected = np.zeros((13, 13), int)
    expected[12] = 1
    for block in quorum.blocks:
        expected[block.query_chunk, list(block.key_chunks)] = 1
    assert record["matrix"]["done"] == expected.tolist()
    assert record["strip"] == [round(1 / 13, 4), 0.0]
    assert record["log"][0]["words"] == "resumed: 25 of 26 subproblems are left"


def test_the_head_group_that_is_shown_is_the_first_that_is_not_finished(plan: Plan) -> None:
    progress = PairProgress(plan)
    assert progress.current == 0
    for index in plan.division_of(0).indices:
        progress.stage(0, index)
        progress.stage(1, index)
        progress.attend(0, index)
    assert progress.current == 1
    assert np.sum(progress.matrix()["in_flight"]) == plan.division_of(1).live.counts.sum()


@given(st.integers(1, 300), st.integers(1, 300), st.randoms(use_true_random=False))
def test_cells_have_all_live_pairs(queries: int, keys: int, random: Any) -> None:
    ranges = sorted((random.randrange(queries), random.randrange(keys)) for _ in range(40))
    owners, starts = (np.array(each, np.int64) for each in zip(*ranges, strict=True))
    live = LivePairs.of_ranges(queries, keys, owners, starts, np.minimum(starts + 9, keys))
    cells = live_cells(live)
    rows, columns = min(queries, MOST_CELLS), min(keys, MOST_CELLS)
    expected = np.zeros((rows, columns), int)
    for query, key in np.argwhere(live.matrix()):
        expected[query * rows // queries, key * columns // keys] += 1
    assert cells.tolist() == expected.tolist()


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 500)), max_size=60))
def test_rates_keep_every_amount_in_bounded_memory(stretches: list[tuple[float, float]]) -> None:
    rates = Rates(100.0, ["read"], 0.5)
    for start, seconds in stretches:
        rates.add("read", 7, 100 + start, 100 + start + seconds)
    assert rates.totals()["read"] == pytest.approx(7 * len(stretches))
    assert len(rates.rates()["read"]) <= MOST_BINS


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), max_size=60))
def test_busy_intervals_are_their_union(stretches: list[tuple[float, float]]) -> None:
    busy, covered = Busy(), Covered(Rates(0.0, [], 0.5))
    spans = [Span("read", start, start + seconds) for start, seconds in stretches]
    for span in spans:
        busy.add(span.start, span.stop)
        covered.add("read", span.start, span.stop)
    union = busy_seconds(spans)
    assert sum(np.subtract(busy.stops, busy.starts)) == pytest.approx(union)
    assert busy.starts == sorted(busy.starts)
    assert covered.seconds.get("read", 0.0) == pytest.approx(union)


def test_ten_thousand_subproblems_on_many_lanes_and_a_fault_each_give_a_small_record(plan: Plan) -> None:
    board, spans = begun(plan), tuple(Span("compute", 200 + n, 200.5 + n) for n in range(2 * MOST_INTERVALS))
    board(make_event("attended", 100, 101, worker="w", spans=spans))
    for number in range(10_000):
        moment = 101.0 + number
        span = Span("compute", moment - 0.9, moment)
        board(
            make_event("attended", moment - 1, moment, index=number % 13, worker=f"w{number % 300}", spans=(span,), pairs=5)
        )
        if number % 10 == 0:
            board(make_event("stalled", moment, moment, reason="slow" * 100))
    record = board.record()
    assert len(json.dumps(record)) < 200_000
    assert len(record["log"]) == MOST_LINES
    assert len(record["rates"]["series"]["tokens"]) <= MOST_BINS
    assert record["lanes"]["count"] > MOST_LANES
    assert {row["lane"] for row in record["lanes"]["rows"]} == {"mean of 301 lanes"}


def test_faults_are_in_the_log_and_change_the_state(plan: Plan) -> None:
    board = begun(plan)
    board(make_event("attended", 101, 102))  # with a partial in the memory of a worker that will be gone
    board(make_event("stalled", 110, 140, reason="worker 1 is paused: free memory"))
    assert (board.record()["state"], board.record()["words"]) == ("stalled", "worker 1 is paused: free memory")
    board(make_event("stalled", 150, 150, reason=""))
    board(make_event("recovered", 160, 160, error="worker 2 is gone", left=plan.subproblems, workers_lost=1))
    assert (board.record()["state"], board.record()["subproblems_done"]) == ("running", 0)
    board(make_event("failed", 170, 170, error="no space left"))
    record = board.record()
    assert (record["state"], record["words"], record["seconds"]) == ("failed", "no space left", 70.0)
    assert [line["words"] for line in record["log"]] == [
        "stalled: worker 1 is paused: free memory",
        "the run continues",
        "recovered: worker 2 is gone",
        "failed: no space left",
    ]


def test_memory_of_a_process_counts_once(plan: Plan) -> None:
    board = begun(plan)
    for process, host in (("a 1", 50), ("a 1", 70), ("b 2", 5)):
        board(make_event("attended", 101, 102, memory=Memory(process, host, 3)))
    memory = board.record()["memory"]
    assert (memory["host"], memory["device"], memory["processes"]) == (75, 6, 2)
    assert memory["host_peak"] == plan.peak_host


def test_a_finished_chunk_that_attends_no_key_has_no_pairs(folder: Path) -> None:
    plan = plan_for(
        folder / "dataset.zarr", chunks=13, window_size=(0, 0), cu_seqlens_q=[0, 60, 130], cu_seqlens_k=[0, 130, 130]
    )
    last = plan.query_chunks - 1
    assert not plan.division_of(0).live.keys(last)
    record = begun(plan, left=plan.subproblems, done=CompletedWork({(0, last)})).record()
    assert np.sum(record["matrix"]["done"]) == 0


def test_the_strip_of_a_billion_head_groups_is_made_at_once() -> None:
    problem = a_problem(1 << 20, batch=2**20, query_heads=2**10, kv_heads=2**10)
    budgets = {"device_memory": 2**90, "host_memory": 2**90}
    progress = PairProgress(make_plan(problem, MACHINE, **budgets, chunks=7, decomposition="cqs"))
    for index in range(7):
        progress.attend(2**29, index)
    assert len(progress.strip()) == MOST_CELLS
    assert progress.current == 2**29


def test_the_strip_counts_each_head_group_by_its_own_mask(folder: Path) -> None:
    path = write_dataset(folder / "batch.zarr", normal_arrays(130, batch=3, kv_heads=2))
    plan = plan_for(path, chunks=13, causal=True, seqused_k=[130, 20, 90])
    progress = PairProgress(plan)
    for index in plan.division_of(2).indices[:1]:
        progress.attend(2, index)
    assert progress.strip() == [0.0, 0.0, round(1 / len(plan.division_of(2).indices), 4), 0.0, 0.0, 0.0]
