"""A lane by itself: its steps give attention, its ledger notices what is wrong, and its helpers count and join."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import attention64, relative_error
from support import MakeLane, normal_arrays, plan_for, run_of, write_dataset, written_bits

from oocattn import IntegrityError, ProblemError
from oocattn.operations import forward
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.lane.partials import files as partial_files
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("causal", [False, True])
def test_stage_attend_merge_and_write_are_attention(
    fast_path: Path, make_lane: MakeLane, causal: bool, partials: str
) -> None:
    arrays = normal_arrays(75, heads=2, kv_heads=1, head_dim=8)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    plan = plan_for(dataset, causal=causal, chunks=7, partials=partials)
    lane = make_lane(plan)
    pairs = 0
    for index in range(7):
        assert lane.stage(index, 0, index).bytes <= plan.slot_bytes
        pairs += lane.attend(index).pairs
    for chunk in range(7):
        lane.merge(0, chunk)
        lane.write(0, chunk)
    assert pairs == plan.problem.pairs
    result = ResultArrays.open(ResultPaths.at(fast_path / "result.zarr").unfinished)
    expected, lse = attention64(*arrays, causal, plan.problem.scale)
    assert relative_error(result.out[...], expected) < 2e-6
    np.testing.assert_allclose(result.lse[...], lse, atol=1e-5)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_turns_are_taken_in_order_whichever_task_comes_first(fast_path: Path, make_lane: MakeLane, partials: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75, heads=2, kv_heads=1))
    plan = replace(plan_for(dataset, causal=True, chunks=7, partials=partials), accumulators=7)
    in_order, swapped = (make_lane(plan, name) for name in ("first.zarr", "second.zarr"))
    expected, found = [], {}
    for turns in ((0, 1), (2, 3), (4, 5), (6,)):
        for turn in turns:
            in_order.stage(turn, 0, turn)
            swapped.stage(turn, 0, turn)
            expected.append(in_order.attend(turn))
        found |= {turn: swapped.attend(turn) for turn in reversed(turns)}
    for turn, event in enumerate(expected):
        assert (found[turn].index, found[turn].pairs, found[turn].partial_bytes) == (turn, event.pairs, event.partial_bytes)
    assert sum(event.pairs for event in expected) == plan.problem.pairs
    computed = [span for turn in range(7) for span in found[turn].spans]
    assert [span.start for span in computed] == sorted(span.start for span in computed)
    for ours, theirs in zip(written_bits(swapped), written_bits(in_order), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_turn_is_staged_and_attended_only_once(fast_path: Path, make_lane: MakeLane) -> None:
    """Dask would, for a task on this lane whose result is needed again where another worker died."""
    arrays = normal_arrays(75, heads=2, kv_heads=1, head_dim=8)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    plan = plan_for(dataset, chunks=7, partials="disk")
    lane = make_lane(plan)
    for index in range(7):
        lane.stage(index, 0, index)
        if index > 1:  # would be staged over the one that waits
            with pytest.raises(RuntimeError, match=f"asked to stage turn {index - 2} where {index + 2} is next"):
                lane.stage(index - 2, 0, index - 2)
            with pytest.raises(RuntimeError, match=f"asked to attend turn {index - 2} where {index} is next"):
                lane.attend(index - 2)
        lane.attend(index)
    written_bits(lane)
    assert relative_error(lane.result.out[...], attention64(*arrays, False, plan.problem.scale)[0]) < 2e-6


def test_every_task_raises_the_error_that_stopped_the_lane(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks attend on a lane at a time, and either may be heard first: so both must name what went wrong."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    lane = make_lane(plan_for(dataset, chunks=7, partials="disk"))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(partial_files, "write_blocks", full)
    for turn in (0, 1):
        lane.stage(turn, 0, turn)
    for turn in (1, 0):
        with pytest.raises(OSError, match="No space left"):
            lane.attend(turn)


@pytest.mark.parametrize("lie", [-1, 1])
def test_the_ledger_notices_keys_that_are_lost_or_attended_twice(fast_path: Path, make_lane: MakeLane, lie: int) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    lane = make_lane(plan_for(dataset, causal=True, chunks=1))
    lane.stage(0, 0, 0)
    lane.attend(0)
    lane.partials.collect(0, 0).state.keys[41] += lie
    with pytest.raises(IntegrityError, match=rf"head group 0, query 41: {42 + lie} keys were attended, expected 42"):
        lane.merge(0, 0)


def test_a_chunk_is_written_part_by_part_as_its_rows_come_back(fast_path: Path, make_lane: MakeLane) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    plan = replace(plan_for(dataset, causal=True, chunks=1), out_chunk_rows=25)
    lane = make_lane(plan)
    lane.stage(0, 0, 0)
    lane.attend(0)
    folder = ResultPaths.at(fast_path / "result.zarr").unfinished / "lse"
    found = []

    def rows() -> Iterator[int]:
        for row, parts in ((30, 1), (49, 1), (75, 3)):  # the first 25 rows are a part, and written when 30 are there
            yield row
            deadline = time.monotonic() + 10
            while len(list(folder.glob("c.0.0.?"))) < parts and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(len(list(folder.glob("c.0.0.?"))))

    lane.finisher.begin(0, 0, rows())
    assert lane.merge(0, 0).pairs == plan.problem.pairs
    lane.write(0, 0)
    assert found == [1, 1, 3]


def test_a_chunk_that_comes_back_in_part_is_not_taken_for_whole(fast_path: Path, make_lane: MakeLane) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    lane = make_lane(replace(plan_for(dataset, causal=True, chunks=1), out_chunk_rows=25))
    lane.stage(0, 0, 0)
    lane.attend(0)
    lane.finisher.begin(0, 0, [30])
    with pytest.raises(IntegrityError, match="chunk 0: the rows from 25 on did not come"):
        lane.merge(0, 0)
    lane.close()  # the first rows are on their way to disk


def test_a_failure_in_one_chunk_lets_the_next_be_finished(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the memory that they are divided into."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    lane = make_lane(plan_for(dataset, causal=True, chunks=3))
    for turn in range(3):
        lane.stage(turn, 0, turn)
        lane.attend(turn)

    def broken(*_: object) -> None:
        raise ArithmeticError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(forward, "finalise", broken)
        with pytest.raises(ArithmeticError):
            lane.merge(0, 0)
    with ThreadPoolExecutor(1) as beside:
        assert beside.submit(lane.merge, 0, 1).result(timeout=20).kind == "merged"
    assert lane.write(0, 1).kind == "written"


def test_partials_on_disk_stay_until_what_replaces_them_is_written(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    lane = make_lane(plan_for(dataset, chunks=3, partials="disk"))
    for turn in range(3):
        lane.stage(turn, 0, turn)
        lane.attend(turn)
    scratch = fast_path / "result.zarr.oocattn" / "partials"
    before = sorted(scratch.iterdir())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ResultArrays, "write", full)
    lane.merge(0, 0)
    with pytest.raises(OSError, match="No space left"):
        lane.write(0, 0)
    assert sorted(scratch.iterdir()) == before


@pytest.mark.parametrize("unseen", ["result.zarr.oocattn/partials", "dataset.zarr"])
def test_a_worker_that_does_not_see_the_folders_of_the_run_is_refused(fast_path: Path, unseen: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(75))
    run = run_of(fast_path, plan_for(dataset))
    (fast_path / unseen).rename(fast_path / "elsewhere")
    with pytest.raises(ProblemError, match=rf"no .*{unseen}.* on .* must see the same paths"):
        Lane(run, "cpu")
