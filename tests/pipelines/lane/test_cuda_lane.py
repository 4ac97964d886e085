"""Whole runs on a GPU: exact, the same bits whatever the way, within their budgets, and through what goes wrong.

Sizes are few, and used by several tests: cuDNN prepares every shape at its first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_datasets import BOUND, BUDGETS, TOKENS, Datasets, assert_verified
from distributed import Client, LocalCluster
from reference import attention64, relative_error
from support import (
    Recorder,
    assert_same_bits,
    carry_out,
    normal_arrays,
    replanned,
    run_of,
    with_partials,
    write_dataset,
    written_bits,
)
from zarr.codecs import ZstdCodec

import oocattn
from oocattn import Event, Plan
from oocattn.kernels.registry import get_kernel
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.events import TaskEvent
from oocattn.storage.paths import ResultPaths

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")]


def require(kernel: str, dtype: str, head_dim: int) -> None:
    """Skip the test where the kernel cannot serve."""
    reason = get_kernel(kernel).unsupported_reason(torch.device("cuda"), dtype, head_dim, head_dim)
    if reason:
        pytest.skip(f"{kernel}: {reason}")


# Exactness

STRIPS = {"chunks": 8, "decomposition": "strips"}
PRECISE = {"precise": True, "dtype": "float32"}
CASES = [
    ("hopper", "float16", 64, (2, 2), True, {"chunks": 7}),
    ("hopper", "bfloat16", 128, (3, 1), True, STRIPS),
    ("hopper", "float16", 96, (8, 1), False, {"chunks": 7}),
    ("hopper", "bfloat16", 64, (8, 1), True, {"chunks": 1}),
    ("hopper", "bfloat16", 256, (1, 1), True, {"chunks": 7}),
    ("hopper", "float32", 64, (3, 1), True, {"chunks": 7}),
    ("hopper", "float32", 128, (1, 1), False, STRIPS),
    ("hopper-precise", "float16", 64, (2, 2), True, {"chunks": 7} | PRECISE),
    ("hopper-precise", "bfloat16", 128, (3, 1), True, STRIPS | PRECISE),
    ("cudnn", "float16", 64, (2, 2), True, {"chunks": 7}),
    ("cudnn", "float16", 64, (2, 2), False, {"chunks": 1}),
    ("cudnn", "bfloat16", 128, (3, 1), True, STRIPS),
    ("cudnn", "float16", 96, (8, 1), False, {"chunks": 7}),
    ("cudnn", "bfloat16", 64, (8, 1), True, {"chunks": 1}),
    ("flash", "float16", 128, (1, 1), True, {"chunks": 7}),
    ("flash", "bfloat16", 96, (3, 1), False, STRIPS),
    ("flash", "float16", 64, (2, 2), True, {"chunks": 1}),
    ("fa3", "bfloat16", 64, (8, 1), True, {"chunks": 7}),
    ("fa3", "float16", 128, (1, 1), False, {"chunks": 1}),
    ("fa3", "float16", 64, (2, 2), True, STRIPS),
    ("torch", "float32", 64, (3, 1), True, {"chunks": 7}),
    ("torch", "float32", 128, (1, 1), False, {"chunks": 1}),
    ("torch", "float16", 64, (2, 2), True, STRIPS),
]


@pytest.mark.parametrize(("kernel", "dtype", "head_dim", "heads", "causal", "options"), CASES, ids=str)
def test_every_kernel_and_division_is_attention(
    client: Client,
    datasets: Datasets,
    tmp_path: Path,
    kernel: str,
    dtype: str,
    head_dim: int,
    heads: tuple[int, int],
    causal: bool,
    options: dict[str, Any],
) -> None:
    require(kernel, dtype, head_dim)
    dataset = datasets(heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype)
    result = oocattn.attention(
        dataset, tmp_path / "result.zarr", causal=causal, kernel=kernel, client=client, **BUDGETS, **options
    )
    assert_verified(result, dtype, precise="precise" in options)
    pairs = TOKENS * (TOKENS + 1) // 2 if causal else TOKENS**2
    assert result.report.pairs == heads[0] * pairs
    assert result.report.out_of_memory == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (31, 31), (1000, 7)])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [*[(kernel, "float16") for kernel in ("hopper", "hopper-precise", "cudnn", "flash", "torch")], ("hopper", "float32")],
)
def test_few_tokens_are_attention(
    client: Client, datasets: Datasets, tmp_path: Path, kernel: str, dtype: str, tokens: int, chunks: int, causal: bool
) -> None:
    sizes: dict[str, Any] = {"heads": 3, "kv_heads": 1, "head_dim": 64, "dtype": dtype}
    dataset = datasets(tokens, **sizes)
    result = oocattn.attention(
        dataset, tmp_path / "result.zarr", causal=causal, chunks=chunks, kernel=kernel, client=client, **BUDGETS
    )
    expected, lse = attention64(*normal_arrays(tokens, **sizes), causal, 0.125)
    assert relative_error(result.out[...], expected) <= BOUND[dtype]
    np.testing.assert_allclose(result.lse[...], lse, atol=2e-5)


def test_batches_that_are_compressed(client: Client, datasets: Datasets, tmp_path: Path) -> None:
    storage = {"compressors": ZstdCodec(level=1), "chunks": (1, 1, 7000, 64)}
    dataset = datasets(20_011, batch=2, heads=2, kv_heads=1, head_dim=64, dtype="float16", storage=storage)
    result = oocattn.attention(dataset, tmp_path / "result.zarr", causal=True, client=client, **BUDGETS)
    assert_verified(result, "float16")
    assert oocattn.plan(dataset, **BUDGETS).device == "cuda"


@pytest.mark.parametrize(("dtype", "kernel"), [("float16", "flash"), ("float32", "torch"), ("float32", "hopper")])
def test_every_element_that_is_not_finite_is_counted_once(client: Client, tmp_path: Path, dtype: str, kernel: str) -> None:
    random = np.random.default_rng(1)
    arrays = normal_arrays(5003, heads=6, kv_heads=2, head_dim=64, batch=2, dtype=dtype)
    for array in arrays:
        array.reshape(-1)[random.choice(array.size, 37, replace=False)] = random.choice([np.nan, np.inf, -np.inf], 37)
    dataset = write_dataset(tmp_path / "dataset.zarr", arrays, 1000)
    for options in ({"chunks": 13}, {"chunks": 6, "decomposition": "strips"}, {"chunks": 8}):
        for causal in (False, True):
            plan = oocattn.plan(dataset, causal=causal, kernel=kernel, **BUDGETS, **options)
            result = carry_out(plan, dataset, tmp_path / "result.zarr", client, overwrite=True)
            assert result.report.not_finite == 3 * 37
            assert result.report.pairs == plan.problem.pairs


# The same bits


@contextmanager
def workers(count: int) -> Iterator[Client]:
    """Workers in this process, which share its GPUs."""
    options = {"n_workers": count, "threads_per_worker": 4, "processes": False, "memory_limit": 0}
    with LocalCluster(**options, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as connected:
        yield connected


def test_bits_do_not_depend_on_workers_runs_or_the_place_of_partials(
    client: Client, half: Path, half_plan: Plan, tmp_path: Path
) -> None:
    expected = carry_out(with_partials(half_plan, "memory"), half, tmp_path / "expected.zarr", client)
    assert_verified(expected, "float16")
    with workers(2) as two:
        for place in ("memory", "disk", "memory", "disk"):
            same = with_partials(half_plan, place)
            for connected, lanes in ((client, 1), (two, 2)):
                found = carry_out(replanned(same, lanes=lanes), half, tmp_path / "result.zarr", connected, overwrite=True)
                assert_same_bits(found, expected)
                assert found.report.lanes == lanes
                assert (found.report.bytes_partials > 0) == (place == "disk")


def test_turns_are_taken_in_order_whichever_task_comes_first(half: Path, half_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "dataset.zarr").symlink_to(half)
    plan = replace(with_partials(half_plan, "memory"), accumulators=7)
    in_order, shuffled = (Lane(run_of(tmp_path, plan, name), "cuda:0") for name in ("first.zarr", "second.zarr"))
    events: dict[int, Event] = {}
    for turns, order in (((0, 1, 2), (2, 0, 1)), ((3, 4, 5), (4, 3, 5)), ((6,), (6,))):
        for turn in turns:
            in_order.stage(turn, 0, turn)
            in_order.attend(turn)
            shuffled.stage(turn, 0, turn)
        events |= {turn: shuffled.attend(turn) for turn in order}
    assert all(event.index == turn for turn, event in events.items())
    assert 2 * sum(event.pairs for event in events.values()) == plan.problem.pairs
    for ours, theirs in zip(written_bits(shuffled), written_bits(in_order), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for made in (in_order, shuffled):
        made.close()


def test_a_damaged_partial_is_computed_again(client: Client, datasets: Datasets, tmp_path: Path) -> None:
    """Of a chunk whose last partial is not even submitted when the first is done: so it cannot be merged before."""
    dataset = datasets(20_011, heads=2, kv_heads=1, head_dim=64, dtype="float16")
    plan = oocattn.plan(dataset, causal=True, chunks=40, decomposition="cqs", kernel="flash", **BUDGETS)
    plan = with_partials(plan, "disk")
    contributors = {chunk: plan.division_of(0).contributors(chunk) for chunk in range(40) if plan.query_rows(chunk)}
    chunk = next(chunk for chunk, these in contributors.items() if these[0] == 0 and these[-1] >= 33)
    partial = ResultPaths.at(tmp_path / "result.zarr").scratch / f"partial-0-{chunk}-0"
    damaged: list[int] = []

    def damage(event: Event) -> None:
        if event.kind == "attended" and not damaged:
            content = bytearray(partial.read_bytes())
            content[-7] ^= 16
            damaged.append(partial.write_bytes(content))

    right = carry_out(plan, dataset, tmp_path / "right.zarr", client)
    found = carry_out(plan, dataset, tmp_path / "result.zarr", client, callbacks=[damage])
    assert found.report.recomputed == 1
    assert found.report.pairs == right.report.pairs == plan.problem.pairs
    assert_same_bits(found, right)


# Memory


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_events_span_every_resource_and_compute_spans_do_not_overlap(
    client: Client, half: Path, half_plan: Plan, tmp_path: Path, partials: str
) -> None:
    recorder = Recorder([])
    plan = with_partials(half_plan, partials)
    report = carry_out(plan, half, tmp_path / "result.zarr", client, [recorder]).report
    spans = [span for event in recorder.events if isinstance(event, TaskEvent) for span in event.spans]
    assert {span.resource for span in spans} == {"read", "copy in", "compute", "copy out", "merge", "write"}
    started, ended = recorder.of("started")[0].start, recorder.of("ended")[0].stop
    assert all(started - 0.01 <= span.start <= span.stop <= ended + 0.01 for span in spans)  # two clocks, one epoch
    computing = sorted((span.start, span.stop) for span in spans if span.resource == "compute")
    assert all(before[1] <= after[0] + 2e-5 for before, after in pairwise(computing))
    assert 0 < report.compute_busy <= 1
    assert report.compute_busy == pytest.approx(sum(stop - start for start, stop in computing) / report.seconds)
