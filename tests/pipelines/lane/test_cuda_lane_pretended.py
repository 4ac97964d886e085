"""The CUDA lane without a GPU: its tiles, buffers, turns and errors, on streams that compute at once on the CPU.

Real GPUs are in `test_cuda_lane`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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
    normal_arrays,
    replanned,
    with_partials,
    write_dataset,
)

import oocattn
from oocattn import BudgetError, Event, Plan, Result
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations import forward, make_operation
from oocattn.pipelines.lane import cuda_memory
from oocattn.pipelines.lane.cuda import CudaDevice
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.lane.rehearsal import sample_tiles
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended, TaskEvent
from oocattn.planning.memory import (
    Tiles,
)
from oocattn.problem.mask import Cover
from oocattn.units import format_bytes


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_memory, "SMALLEST_TILE", 1)


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
    made = pretend.gpu_plan(dataset, None, None if kind == "strips" else kind, **options)
    made = replanned(made, tiles=Tiles(min(tiles[0], made.chunk_rows), min(tiles[1], made.chunk_rows)))
    assert_attention(carry_out(made, dataset, fast_path / "result.zarr", overwrite=True), made, arrays)


@pytest.mark.parametrize("options", [{"chunks": 7}, {"chunks": 3, "causal": True}, {"chunks": 4, "decomposition": "strips"}])
def test_sampled_tiles_have_the_shapes_of_every_kernel_call(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(331))
    plan = pretend.gpu_plan(dataset, (29, 17), **options)
    made = set()
    kernel = type(get_kernel(plan.kernel))
    attend = kernel.attend

    def note(self: Kernel, operands: Operands, state: AttentionState) -> None:
        made.add((operands.rows, operands.keys, operands.intervals is None))
        attend(self, operands, state)

    monkeypatch.setattr(kernel, "attend", note)
    carry_out(plan, dataset, fast_path / "result.zarr")
    assert made == {
        (shape.rows, shape.keys, shape.cover is Cover.FULL) for shape in sample_tiles(plan, make_operation(plan))
    }


@pytest.mark.parametrize(("partials", "merges"), [("memory", 0), ("disk", 1)])
def test_a_report_has_the_bytes_that_were_copied(fast_path: Path, partials: str, merges: int) -> None:
    """100 queries in tiles of 40 against 60 keys: 2 query heads, 1 KV head of 8 float16; all rows attend all keys."""
    q, k, v = normal_arrays(100, dtype="float16")
    dataset, result = write_dataset(fast_path / "dataset.zarr", (q, k[:, :, :60], v[:, :, :60])), fast_path / "result.zarr"
    recorder = Recorder([])
    carry_out(pretend.gpu_plan(dataset, (40, 60), partials, chunks=1), dataset, result, callbacks=[recorder])
    ledger = 100 * (8 + 8)
    state = 2 * 100 * (8 + 1 + 1) * 4 + ledger  # num, den and max of both heads
    divided = state + ledger  # head by head, each with the ledger
    copied_in = 100 * 2 * 8 * 2 + 3 * 60 * (8 + 8) * 2 + merges * 2 * state + divided  # q; k and v for each tile of q
    copied_out = state + merges * state + 100 * 2 * (8 * 2 + 4)  # at last out and lse
    (attempt,) = oocattn.report(result).attempts
    assert (attempt.bytes_copied_in, attempt.bytes_copied_out) == (copied_in, copied_out)
    assert [sum(getattr(event, name) for event in recorder.events if isinstance(event, TaskEvent)) for name in (
        "copied_in", "copied_out",
    )] == [copied_in, copied_out]  # fmt: skip
    link = {link.name: link for link in oocattn.report(result).links}
    assert link["copy"].amount == copied_in + copied_out
    assert format_bytes(copied_in + copied_out) in oocattn.report(result).page()


@contextmanager
def workers(count: int, threads: int) -> Iterator[Client]:
    options = {"n_workers": count, "threads_per_worker": threads, "processes": False, "memory_limit": 0}
    with LocalCluster(**options, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as connected:
        yield connected


def test_bits_do_not_depend_on_workers_threads_or_the_place_of_partials(fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(151, heads=4, kv_heads=2, dtype="float16"))
    made = pretend.gpu_plan(dataset, (20, 10), causal=True, chunks=7)
    expected = carry_out(made, dataset, fast_path / "expected.zarr")
    for count, threads in ((1, 1), (2, 3)):
        with workers(count, threads) as connected:
            for partials in ("memory", "disk"):
                same = replanned(with_partials(made, partials), lanes=count)
                assert same.digest == made.digest
                found = carry_out(same, dataset, fast_path / "result.zarr", connected, overwrite=True)
                assert_same_bits(found, expected)


@pytest.mark.parametrize(("count", "partials"), [(4, "memory"), (9, "disk"), (13, "memory")])
def test_an_interrupted_run_goes_on_to_the_same_bits(client: Client, fast_path: Path, partials: str, count: int) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(151, heads=4, kv_heads=2, dtype="float16"))
    made = replanned(pretend.gpu_plan(dataset, (20, 10), partials, causal=True, chunks=7), checkpoint_seconds=0.02)
    expected = carry_out(made, dataset, fast_path / "expected.zarr")
    before, after = Recorder([]), Recorder([])

    def stop(event: Event) -> None:
        if event.kind == "attended" and len(before.of("attended")) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(made, dataset, fast_path / "result.zarr", client, callbacks=[before, stop])
    found = oocattn.resume(fast_path / "result.zarr", client=client, callbacks=[after])
    assert_same_bits(found, expected)
    assert len(after.of("attended")) <= made.subproblems - count


@pytest.mark.parametrize("engine", ["dask", "inline"])
def test_a_subproblem_that_waits_for_its_turn_is_not_begun_as_a_run_ends(
    engine: str, client: Client, fast_path: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, dtype="float16"))
    plan = pretend.gpu_plan(dataset, (20, 10), "memory", chunks=7)
    where: Client | Literal["inline"] = client if engine == "dask" else "inline"
    begun: list[int] = []
    launch, attend, waiting = CudaDevice.launch, Lane.attend, threading.Semaphore(0)

    def launch_slowly(device: CudaDevice, staged: StagedChunks, *others: Any) -> Callable[[], Attended]:
        begun.append(staged.index)
        time.sleep(1.0)
        return launch(device, staged, *others)

    def note(lane: Lane, turn: int) -> Attended | None:
        waiting.release()
        return attend(lane, turn)

    def stop(event: Event) -> None:
        if event.kind == "staged" and waiting.acquire(timeout=10) and waiting.acquire(timeout=10):
            time.sleep(0.1)  # so that the second waits for the first
            raise KeyboardInterrupt

    with monkeypatch.context() as slow:
        slow.setattr(CudaDevice, "launch", launch_slowly)
        slow.setattr(Lane, "attend", note)
        with pytest.raises(KeyboardInterrupt):
            carry_out(plan, dataset, result, where, [stop])
    assert len(begun) == 1
    assert oocattn.status(result).subproblems_done == 1
    assert_same_bits(carry_out(plan, dataset, result, where), carry_out(plan, dataset, fast_path / "expected.zarr"))


# Out of memory


def cramp(monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
    usual = forward.get_kernel
    monkeypatch.setattr(forward, "get_kernel", lambda name: CrampedKernel(usual(name), most_rows))


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("most_rows", [31, 5])
def test_out_of_memory_goes_on_with_smaller_tiles(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, most_rows: int, partials: str
) -> None:
    arrays = normal_arrays(301, heads=3, kv_heads=1)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    cramp(monkeypatch, most_rows)
    made = pretend.gpu_plan(dataset, (43, 20), partials, causal=True, chunks=7)
    result = carry_out(made, dataset, fast_path / "result.zarr")
    assert_attention(result, made, arrays)
    assert result.report.out_of_memory == {31: 1, 5: 3}[most_rows]  # tiles of 43, 21, 10, 5
    assert f"out of memory {result.report.out_of_memory} times" in str(result.report)


def test_no_room_for_the_smallest_tile_is_a_budget_error(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301))
    cramp(monkeypatch, 0)
    with pytest.raises(BudgetError, match="no memory left even for tiles of 1 queries: free some, or lower device_memory"):
        carry_out(pretend.gpu_plan(dataset, (64, 20), chunks=1), dataset, fast_path / "result.zarr")
    assert not (fast_path / "result.zarr").exists()


def test_a_device_that_is_too_full_at_first_gets_smaller_tiles(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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

    monkeypatch.setattr(cuda_memory, "torch", Full())
    made = pretend.gpu_plan(dataset, (64, 20), chunks=7)
    result = carry_out(made, dataset, fast_path / "result.zarr")
    assert_attention(result, made, arrays)
    assert [record.args[1] for record in caplog.records if "out of memory" in record.msg] == [32, 16]


# Events


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_events_span_every_resource_and_compute_spans_do_not_overlap(client: Client, fast_path: Path, partials: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(301, heads=4, kv_heads=2))
    recorder = Recorder([])
    made = pretend.gpu_plan(dataset, (40, 20), partials, causal=True, chunks=7)
    report = carry_out(made, dataset, fast_path / "result.zarr", client, [recorder]).report
    spans = [span for event in recorder.events if isinstance(event, TaskEvent) for span in event.spans]
    assert {span.resource for span in spans} == {"read", "copy in", "compute", "copy out", "merge", "write"}
    computing = sorted((span.start, span.stop) for span in spans if span.resource == "compute")
    assert all(before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(computing))
    assert report.compute_busy == pytest.approx(sum(stop - start for start, stop in computing) / report.seconds)
    assert 0 < report.compute_busy <= 1
    assert report.out_of_memory == 0
