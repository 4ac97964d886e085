"""The CUDA lane without a GPU: its tiles, buffers, turns and errors, on streams that compute at once on the CPU.

Real GPUs are in `test_cuda_lane`.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import attention64, relative_error
from support import (
    Arrays,
    CrampedKernel,
    Recorder,
    assert_same_bits,
    carry_out,
    job_of,
    normal_arrays,
    outlives_its_use,
    plan_for,
    with_partials,
    write_dataset,
    written_bits,
)

import oocattn
from oocattn import BudgetError, Event, Plan, Result
from oocattn.kernels import Kernel, get_kernel
from oocattn.memory import (
    ALIGNMENT,
    LEDGER_BYTES,
    MERGE_SCRATCH_BYTES,
    SEGMENT,
    STAGING_SLOTS,
    Tiles,
    cuda_memory,
)
from oocattn.pipelines import cuda_lane, lane, partial_files
from oocattn.pipelines.arena import Arena
from oocattn.pipelines.cuda_lane import CudaLane
from oocattn.pipelines.partials import Destination
from oocattn.pipelines.tiles import call_shapes
from oocattn.storage.result import ResultPaths


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_lane, "SMALLEST_TILE", 1)


def gpu_plan(dataset: Path, tiles: tuple[int, int] | None = None, partials: str | None = None, **options: object) -> Plan:
    """A plan for the pretended GPU, with tiles that suit a few hundred tokens."""
    plan = plan_for(dataset, machine=pretend.PRETENDED, partials=partials, **options)
    return plan if tiles is None else replace(plan, tiles=Tiles(*tiles))


def assert_attention(result: Result, plan: Plan, arrays: Arrays) -> None:
    expected, lse = attention64(*arrays, plan.problem.causal, plan.problem.scale)
    assert relative_error(result.out[...], expected) < {"float32": 2e-6, "float16": 3e-4}[plan.problem.out_dtype]
    np.testing.assert_allclose(result.lse[...], lse, atol=1e-5)
    assert result.report.pairs == plan.problem.pairs


@given(
    tokens=st.integers(1, 100),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    dtype=st.sampled_from(["float16", "float32"]),
    causal=st.booleans(),
    chunks=st.integers(1, 7),
    kind=st.sampled_from(["memory", "disk", "strips"]),
    tiles=st.tuples(st.integers(3, 60), st.integers(3, 60)),
)
@settings(max_examples=25)
def test_any_tiles_and_partials_are_attention(
    client: Client,
    fast_path: Path,
    tokens: int,
    heads: tuple[int, int],
    dtype: str,
    causal: bool,
    chunks: int,
    kind: str,
    tiles: tuple[int, int],
) -> None:
    arrays = normal_arrays(tokens, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    options = {"causal": causal, "chunks": min(chunks, tokens), "decomposition": "strips" if kind == "strips" else "cqs"}
    made = gpu_plan(dataset, tiles, None if kind == "strips" else kind, **options)
    made = replace(made, tiles=Tiles(min(tiles[0], made.chunk_rows), min(tiles[1], made.chunk_rows)))
    assert_attention(carry_out(made, dataset, fast_path / "result.zarr", client, overwrite=True), made, arrays)


@pytest.mark.parametrize("options", [{"chunks": 7}, {"chunks": 3, "causal": True}, {"chunks": 4, "decomposition": "strips"}])
def test_every_call_was_foreseen(
    client: Client, fast_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(331))
    plan = gpu_plan(dataset, (29, 17), **options)
    made = set()
    kernel = type(get_kernel(plan.kernel))
    attend = kernel.attend

    def note(self: Kernel, query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor, **how: Any) -> None:
        made.add((query.shape[1], len(key), how["diagonal"]))
        attend(self, query, key, *rest, **how)

    monkeypatch.setattr(kernel, "attend", note)
    carry_out(plan, dataset, fast_path / "result.zarr", client)
    assert made == {(shape.rows, shape.keys, shape.diagonal) for shape in call_shapes(plan)}


@contextmanager
def workers(count: int, threads: int) -> Iterator[Client]:
    options = {"n_workers": count, "threads_per_worker": threads, "processes": False, "memory_limit": 0}
    with LocalCluster(**options, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as connected:
        yield connected


def test_bits_do_not_depend_on_workers_threads_or_the_place_of_partials(client: Client, fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(151, heads=4, kv_heads=2, dtype="float16"))
    made = gpu_plan(dataset, (20, 10), causal=True, chunks=7)
    expected = carry_out(made, dataset, fast_path / "expected.zarr", client)
    for count, threads in ((1, 1), (2, 3)):
        with workers(count, threads) as connected:
            for partials in ("memory", "disk"):
                same = replace(with_partials(made, partials), lanes=count)
                assert same.digest == made.digest
                found = carry_out(same, dataset, fast_path / "result.zarr", connected, overwrite=True)
                assert_same_bits(found, expected)


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("count", [4, 9, 13])
def test_an_interrupted_run_goes_on_to_the_same_bits(client: Client, fast_path: Path, partials: str, count: int) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(151, heads=4, kv_heads=2, dtype="float16"))
    made = replace(gpu_plan(dataset, (20, 10), partials, causal=True, chunks=13), checkpoint_seconds=0.02)
    expected = carry_out(made, dataset, fast_path / "expected.zarr", client)
    before, after = Recorder([]), Recorder([])

    def stop(event: Event) -> None:
        if event.kind == "attended" and len(before.of("attended")) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(made, dataset, fast_path / "result.zarr", client, callbacks=[before, stop])
    found = oocattn.resume(fast_path / "result.zarr", client=client, callbacks=[after])
    assert_same_bits(found, expected)
    assert len(after.of("attended")) <= made.subproblems - count


# One lane


def lane_of(folder: Path, plan: Plan, result: str = "result.zarr") -> CudaLane:
    return CudaLane(job_of(folder, plan, result), "cuda:0")


def test_a_chunk_is_written_while_its_last_tiles_are_computed(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(80, heads=1))
    made = replace(gpu_plan(dataset, (20, 10), causal=True, chunks=1), out_chunk_rows=20)
    last, waits = threading.Event(), []

    def synchronize(event: pretend.Event) -> None:
        if threading.current_thread().name.startswith("oocattn-divide"):
            waits.append(event)
            assert len(waits) < 5 or last.wait(20)  # twice for a tile: until it is back, and until it is divided

    monkeypatch.setattr(pretend.Event, "synchronize", synchronize)
    lane = lane_of(fast_path, made)
    lane.stage(0, 0, 0)
    lane.attend(0)
    folder = ResultPaths.at(fast_path / "result.zarr").growing / "out"
    deadline = time.monotonic() + 20
    while len(list(folder.glob("c.0.0.?.0"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.name for path in folder.glob("c.*")) == ["c.0.0.0.0", "c.0.0.1.0"]
    last.set()
    assert lane.merge(0, 0).amount == made.problem.pairs
    lane.write(0, 0)
    assert len(list(folder.glob("c.0.0.?.0"))) == 4
    lane.close()


def test_a_closed_lane_leaves_no_memory_behind(fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(80))
    assert not outlives_its_use(lambda: lane_of(fast_path, gpu_plan(dataset, (20, 10), chunks=1)))


@pytest.mark.parametrize("awaited", [False, True])
def test_what_a_save_waits_for_comes_back_before_more_is_begun(fast_path: Path, awaited: bool) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    lane = lane_of(fast_path, gpu_plan(dataset, (6, 4), "memory", chunks=3))
    on_their_way: list[int] = []
    begin = lane.partials.begin

    def watched(*arguments: int) -> Destination:
        on_their_way.append(len(lane._coming_back))
        return begin(*arguments)

    lane.partials.begin, lane.partials.awaited = watched, lambda *_: awaited
    lane.stage(0, 0, 0)
    lane.stage(1, 0, 1)
    lane.attend(1)  # and the one before
    lane.attend(0)
    assert (max(on_their_way) == 0) is awaited
    lane.close()


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_turns_are_taken_in_order_whichever_task_comes_first(fast_path: Path, partials: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = gpu_plan(dataset, (6, 4), partials, causal=True, chunks=7)
    made = replace(made, accumulators=7)
    in_order, shuffled = (lane_of(fast_path, made, name) for name in ("first.zarr", "second.zarr"))
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
        chunks = made.division.subproblem(turn).blocks
        assert (
            event.amount
            == sum(
                len(made.tokens(block.query_chunk)) * sum(len(made.tokens(key)) for key in block.key_chunks)
                + block.diagonal * sum(range(1, len(made.tokens(block.query_chunk)) + 1))
                for block in chunks
            )
            * made.problem.group_size
        )
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
def test_what_a_lane_takes_is_what_was_planned(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, partials: str, problem: dict, tiles: tuple[int, int]
) -> None:
    """Memory of exactly the planned size is enough for all that is taken of it, and not much is left."""
    left: list[int] = []
    pinned: list[int] = []

    class Watched(Arena):
        def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            taken = super().take(shape, dtype)
            left.append(len(self._memory) - self._used)
            return taken

    class Counted(pretend.Memory):
        def __init__(self, nbytes: int) -> None:
            super().__init__(nbytes)
            pinned.append(-(-nbytes // SEGMENT) * SEGMENT)  # in huge pages

    monkeypatch.setattr(cuda_lane, "Arena", Watched)
    monkeypatch.setattr(cuda_lane, "PinnedMemory", Counted)
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301, **problem))
    made = gpu_plan(dataset, tiles, partials, chunks=3)
    lane = lane_of(fast_path, made)
    lane._allocated.result()
    lane.close()
    assert left[-1] < SEGMENT + 64 * ALIGNMENT
    temporaries = MERGE_SCRATCH_BYTES + LEDGER_BYTES * made.out_chunk_rows
    assert sum(pinned) == cuda_memory(made.problem, made.buffers, made.tiles, 0).host - temporaries


@pytest.mark.parametrize(
    "first_first",
    [False, True],
)
def test_switching_between_threads_is_as_before_when_all_lanes_are_closed(fast_path: Path, first_first: bool) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made, usual = gpu_plan(dataset, chunks=1), 0.005
    sys.setswitchinterval(usual)
    lanes = [lane_of(fast_path, made, name) for name in ("first.zarr", "second.zarr")]
    try:
        assert sys.getswitchinterval() < usual
        for each in lanes if first_first else reversed(lanes):
            each.close()
        assert sys.getswitchinterval() == usual
    finally:
        sys.setswitchinterval(usual)


# Out of memory


def cramp(monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
    usual = lane.get_kernel
    monkeypatch.setattr(lane, "get_kernel", lambda name: CrampedKernel(usual(name), most_rows))


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("most_rows", [31, 5])
def test_out_of_memory_goes_on_with_smaller_tiles(
    client: Client, fast_path: Path, monkeypatch: pytest.MonkeyPatch, most_rows: int, partials: str
) -> None:
    arrays = normal_arrays(301, heads=3, kv_heads=1)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    cramp(monkeypatch, most_rows)
    made = gpu_plan(dataset, (43, 20), partials, causal=True, chunks=7)
    result = carry_out(made, dataset, fast_path / "result.zarr", client)
    assert_attention(result, made, arrays)
    assert result.report.out_of_memory == {31: 1, 5: 3}[most_rows]  # tiles of 43, 21, 10, 5
    assert f"out of memory {result.report.out_of_memory} times" in str(result.report)


def test_no_memory_at_all_is_said(client: Client, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301))
    cramp(monkeypatch, 0)
    with pytest.raises(BudgetError, match="no memory left even for tiles of 1 queries: free some, or lower --device-memory"):
        carry_out(gpu_plan(dataset, (64, 20), chunks=1), dataset, fast_path / "result.zarr", client)
    assert not (fast_path / "result.zarr").exists()


def test_a_device_that_is_too_full_at_first_gets_smaller_tiles(
    client: Client, fast_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = normal_arrays(301)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    refused = []

    class Full(pretend.Torch):
        def empty(self, *shape: object, **options: object) -> torch.Tensor:
            if len(refused) < 2:
                refused.append(shape)
                raise torch.OutOfMemoryError("the device is full")
            return torch.empty(*shape, **options)

    monkeypatch.setattr(cuda_lane, "torch", Full())
    made = gpu_plan(dataset, (64, 20), chunks=7)
    result = carry_out(made, dataset, fast_path / "result.zarr", client)
    assert_attention(result, made, arrays)
    assert [record.args[1] for record in caplog.records if "out of memory" in record.msg] == [32, 16]


@pytest.mark.parametrize("heard", [(0, 1), (1, 0)], ids=str)
def test_every_task_tells_the_error_that_stopped_the_lane(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, heard: tuple[int, int]
) -> None:
    """Two tasks attend on a lane at a time, and either may be heard first: so both must name what went wrong."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = lane_of(fast_path, gpu_plan(dataset, (6, 4), "disk", chunks=7))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(partial_files, "write_blocks", full)
    for turn in (0, 1):
        made.stage(turn, 0, turn)
    for turn in heard:
        with pytest.raises(OSError, match="No space left"):
            made.attend(turn)


def test_so_does_a_task_that_waits_when_it_happens(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second subproblem is enqueued as soon as a partial of the first is on disk; instead, the disk is full."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    made = lane_of(fast_path, gpu_plan(dataset, (6, 4), "disk", chunks=3))
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


# What a run tells


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_every_resource_is_told_of_and_compute_is_one_thing_at_a_time(
    client: Client, fast_path: Path, partials: str
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301, heads=4, kv_heads=2))
    recorder = Recorder([])
    made = gpu_plan(dataset, (40, 20), partials, causal=True, chunks=7)
    report = carry_out(made, dataset, fast_path / "result.zarr", client, [recorder]).report
    spans = [span for event in recorder.events for span in event.spans]
    assert {span.resource for span in spans} == {"read", "copy in", "compute", "copy out", "merge", "write"}
    computing = sorted((span.start, span.stop) for span in spans if span.resource == "compute")
    assert all(before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(computing))
    assert report.compute_busy == pytest.approx(sum(stop - start for start, stop in computing) / report.seconds)
    assert 0 < report.compute_busy <= 1
    assert report.out_of_memory == 0
