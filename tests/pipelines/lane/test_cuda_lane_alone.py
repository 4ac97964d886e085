"""One CUDA lane by itself, on a pretended GPU: what it takes and gives back, the order of its turns, its errors."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from support import (
    MakeLane,
    normal_arrays,
    write_dataset,
    written_bits,
)

from oocattn.errors import TaskError
from oocattn.pipelines.lane import cuda, cuda_memory
from oocattn.pipelines.lane.memory import Arena
from oocattn.pipelines.lane.partials import files as partial_files
from oocattn.pipelines.lane.partials.store import Destination
from oocattn.planning.memory import (
    ALIGNMENT,
    LEAST_ARENA,
    MERGE_SCRATCH_BYTES,
    SEGMENT,
    STAGING_SLOTS,
    ledger_bytes,
)
from oocattn.planning.memory import (
    lane_bytes as planned_memory,
)
from oocattn.storage.paths import ResultPaths


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_memory, "SMALLEST_TILE", 1)


def test_a_chunk_is_written_while_its_last_tiles_are_computed(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(80, heads=1))
    made = replace(pretend.gpu_plan(dataset, (20, 10), causal=True, chunks=1), out_chunk_rows=20)
    last, waits = threading.Event(), []

    def synchronize(event: pretend.Event) -> None:
        if threading.current_thread().name.startswith("oocattn-divide"):
            waits.append(event)
            assert len(waits) < 5 or last.wait(20)  # twice for a tile: until it is back, and until it is divided

    monkeypatch.setattr(pretend.Event, "synchronize", synchronize)
    lane = make_lane(made)
    lane.stage(0, 0, 0)
    lane.attend(0)
    folder = ResultPaths.at(fast_path / "result.zarr").unfinished / "out"
    deadline = time.monotonic() + 20
    while len(list(folder.glob("c.0.0.?.0"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.name for path in folder.glob("c.*")) == ["c.0.0.0.0", "c.0.0.1.0"]
    last.set()
    assert lane.merge(0, 0).pairs == made.problem.pairs
    lane.write(0, 0)
    assert len(list(folder.glob("c.0.0.?.0"))) == 4
    lane.close()


def test_a_chunk_is_written_while_its_last_tile_is_still_to_be_enqueued(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a chunk has more calls than may be ahead of the device, that is nearly all of its time."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(80, heads=1))
    made = replace(pretend.gpu_plan(dataset, (20, 10), causal=True, chunks=1), out_chunk_rows=20)
    launch_tile, written = cuda.CudaDevice._launch_tile, []

    def launch_last_later(device: cuda.CudaDevice, launch: Any, block: Any, tile: range, *others: Any) -> Any:
        folder, deadline = ResultPaths.at(fast_path / "result.zarr").unfinished / "out", time.monotonic() + 20
        while tile.start == 60 and len(list(folder.glob("c.0.0.?.0"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        written.append(sorted(path.name for path in folder.glob("c.0.0.?.0")))
        return launch_tile(device, launch, block, tile, *others)

    monkeypatch.setattr(cuda.CudaDevice, "_launch_tile", launch_last_later)
    lane = make_lane(made)
    lane.stage(0, 0, 0)
    lane.attend(0)
    assert written[-1] == ["c.0.0.0.0", "c.0.0.1.0", "c.0.0.2.0"]
    assert lane.merge(0, 0).pairs == made.problem.pairs
    lane.close()


def test_an_error_between_tiles_ends_the_lane(fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that finishes the chunk does not wait for the tiles that do not come."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(80, heads=1))
    made = replace(pretend.gpu_plan(dataset, (20, 10), causal=True, chunks=1), out_chunk_rows=20)
    launch_tile = cuda.CudaDevice._launch_tile

    def fail_in_the_third(device: cuda.CudaDevice, launch: Any, block: Any, tile: range, *others: Any) -> Any:
        if tile.start == 40:
            raise ArithmeticError("no more")
        return launch_tile(device, launch, block, tile, *others)

    monkeypatch.setattr(cuda.CudaDevice, "_launch_tile", fail_in_the_third)
    lane = make_lane(made)
    lane.stage(0, 0, 0)
    with pytest.raises(TaskError, match="no more"):
        lane.attend(0)
    closing = threading.Thread(target=lane.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.parametrize("awaited", [False, True])
def test_partials_that_a_save_waits_for_come_back_before_more_are_begun(
    fast_path: Path, make_lane: MakeLane, awaited: bool
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    lane = make_lane(pretend.gpu_plan(dataset, (6, 4), "memory", chunks=3))
    on_their_way: list[int] = []
    begin = lane.partials.begin

    def watched(*arguments: int) -> Destination:
        on_their_way.append(len(lane.device._coming_back))
        return begin(*arguments)

    lane.partials.begin, lane.partials.save_pending = watched, lambda *_: awaited
    lane.stage(0, 0, 0)
    lane.stage(1, 0, 1)
    lane.attend(1)  # and the one before
    lane.attend(0)
    assert (max(on_their_way) == 0) is awaited
    lane.close()


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_turns_are_taken_in_order_whichever_task_comes_first(fast_path: Path, make_lane: MakeLane, partials: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = pretend.gpu_plan(dataset, (6, 4), partials, causal=True, chunks=7)
    made = replace(made, accumulators=7)
    in_order, shuffled = (make_lane(made, name) for name in ("first.zarr", "second.zarr"))
    events, slots = {}, STAGING_SLOTS["cuda"]
    for first in range(0, 7, slots):
        turns = range(first, min(first + slots, 7))
        for turn in turns:
            in_order.stage(turn, 0, turn)
            in_order.attend(turn)
            shuffled.stage(turn, 0, turn)
        for turn in random.Random(first).sample(turns, len(turns))[::-1]:
            events[turn] = shuffled.attend(turn)
    for turn, event in events.items():
        assert (event.head_group, event.index) == (0, turn)
        pairs = sum(
            made.mask(0).pairs(made.query_rows(block.query_chunk), made.key_rows(key))
            for block in made.division_of(0).subproblem(turn).blocks
            for key in block.key_chunks
        )
        assert event.pairs == pairs * made.problem.group_size
        assert {span.resource for span in event.spans} >= {"copy in", "compute", "copy out"}
    for ours, theirs in zip(written_bits(shuffled), written_bits(in_order), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for each in (in_order, shuffled):
        each.close()


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(
    "problem",
    [
        {"heads": 1, "head_dim": 1, "dtype": "float32"},
        {"heads": 3, "head_dim": 7, "dtype": "float16"},
        {"heads": 8, "head_dim": 40, "dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tiles", [(1, 1), (129, 128), (20_000, 9000)])
def test_a_gpu_lane_allocates_exactly_what_was_planned(
    fast_path: Path,
    make_lane: MakeLane,
    monkeypatch: pytest.MonkeyPatch,
    partials: str,
    problem: dict,
    tiles: tuple[int, int],
) -> None:
    """Memory of exactly the planned size is enough for all that is taken of it; of more than the least not much is left."""
    left: list[tuple[int, int]] = []
    pinned: list[int] = []

    class Watched(Arena):
        def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            taken = super().take(shape, dtype)
            left.append((len(self._memory), len(self._memory) - self._used))
            return taken

    class Counted(pretend.Memory):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            pinned.append(-(-nbytes // SEGMENT) * SEGMENT)  # in huge pages

    monkeypatch.setattr(cuda_memory, "Arena", Watched)
    monkeypatch.setattr(cuda, "PinnedMemory", Counted)
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301, **problem))
    made = pretend.gpu_plan(dataset, tiles, partials, chunks=3)
    lane = make_lane(made)
    lane.memory._allocated.result()
    lane.close()
    memory, rest = left[-1]
    assert rest < SEGMENT + ALIGNMENT or memory == LEAST_ARENA
    temporaries = MERGE_SCRATCH_BYTES + ledger_bytes("cuda", made.chunk_rows)
    assert sum(pinned) == planned_memory(made.problem, made.buffers, made.tiles, 0, 0)[1] - temporaries


@pytest.mark.parametrize("heard", [(0, 1), (1, 0)], ids=str)
def test_every_task_raises_the_error_that_stopped_the_lane(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch, heard: tuple[int, int]
) -> None:
    """Two tasks attend on a lane at a time, and either may be heard first: so both must name what went wrong."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = make_lane(pretend.gpu_plan(dataset, (6, 4), "disk", chunks=7))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(partial_files, "write_blocks", full)
    for turn in (0, 1):
        made.stage(turn, 0, turn)
    for turn in heard:
        with pytest.raises(OSError, match="No space left"):
            made.attend(turn)


def test_a_waiting_task_raises_the_error_that_stops_the_lane(
    fast_path: Path, make_lane: MakeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second subproblem is enqueued as soon as a partial of the first is on disk; instead, the disk is full."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = make_lane(pretend.gpu_plan(dataset, (6, 4), "disk", chunks=3))
    writing, waits = threading.Event(), threading.Event()

    def full(*_: object) -> int:
        writing.set()
        waits.wait(10)
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for turn in (0, 1):
        made.stage(turn, 0, turn)
    monkeypatch.setattr(partial_files, "write_blocks", full)
    with ThreadPoolExecutor(2) as tasks:
        first = tasks.submit(made.attend, 0)
        assert writing.wait(10)
        second = tasks.submit(made.attend, 1)
        waits.set()
        for task in (first, second):
            with pytest.raises(OSError, match="No space left"):
                task.result(20)
