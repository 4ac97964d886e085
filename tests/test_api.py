"""The public functions end to end: a cluster of their own, options, callbacks, budgets, and what they return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from distributed import Client, LocalCluster
from reference import attention64, relative_error
from support import BESIDE, Recorder, bits, carry_out, normal_arrays, plan_for, replanned, with_partials, write_dataset

import oocattn
from oocattn import Event, ProblemError, ResultExistsError
from oocattn.kernels.registry import device_type, kernel_names
from oocattn.pipelines.watch.events import Started
from oocattn.storage.make.synth import synthesise


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130, heads=4, kv_heads=2, head_dim=16), 40)


def test_everything_public_is_there_and_said() -> None:
    for name in oocattn.__all__:
        assert getattr(oocattn, name) is not None
    assert all(getattr(oocattn, name).__doc__ for name in oocattn.__all__ if name not in ("__version__", "Callback"))


def test_a_run_with_a_cluster_of_its_own(dataset: Path, fast_path: Path) -> None:
    recorder = Recorder([])
    result = oocattn.attention(str(dataset), str(fast_path / "out.zarr"), causal=True, callbacks=[recorder])
    expected, lse = attention64(*normal_arrays(130, heads=4, kv_heads=2, head_dim=16), True, 0.25)
    assert relative_error(result.out[...], expected) < 2e-6
    np.testing.assert_allclose(result.lse[...], lse, atol=1e-5)
    assert (result.out.shape, result.out.dtype, result.lse.dtype) == ((1, 4, 130, 16), np.float32, np.float32)
    dashboard = recorder.events[0].dashboard
    assert dashboard.startswith("http://127.0.0.1:")
    assert oocattn.status(fast_path / "out.zarr").state == "finished"
    assert oocattn.open(fast_path / "out.zarr").certificate is None
    assert oocattn.verify(fast_path / "out.zarr").passed
    assert oocattn.open(fast_path / "out.zarr").certificate.outcome == "passed"


def test_the_result_is_plain_zarr_beside_its_report(client: Client, dataset: Path, fast_path: Path) -> None:
    result = oocattn.attention(dataset, fast_path / "deep" / "out.zarr", dtype="bfloat16", client=client)
    group = zarr.open_group(fast_path / "deep" / "out.zarr", mode="r")
    np.testing.assert_array_equal(group["out"][...], result.out[...])
    assert group["out"].dtype == ml_dtypes.bfloat16
    recorded = group.attrs["oocattn"]
    assert recorded["problem"]["keys"] == 130
    assert recorded["problem"]["out_dtype"] == "bfloat16"
    assert recorded["dataset"]["location"] == str(dataset)
    assert recorded["versions"]["oocattn"] == oocattn.__version__
    folder = fast_path / "deep"
    assert sorted(path.name for path in folder.iterdir()) == ["out.zarr", "out.zarr.oocattn"]
    assert {path.name for path in (folder / "out.zarr.oocattn").iterdir()} == BESIDE


def test_a_result_stands_for_its_place(dataset: Path, fast_path: Path) -> None:
    result = oocattn.attention(dataset, fast_path / "out.zarr", engine="inline")
    assert oocattn.verify(result, rows=4).passed
    assert oocattn.open(result).certificate.outcome == oocattn.status(result).certificate == "passed"
    assert oocattn.survey(result, arrays=["entropy"], engine="inline").path == str(fast_path / "out.zarr")
    assert oocattn.survey(oocattn.open(result), arrays=["entropy"]).arrays["entropy"].shape == (1, 4, 130)
    assert oocattn.report(result).result == str(fast_path / "out.zarr")
    assert oocattn.resume(result).path == result.path


def test_options_reach_the_plan(client: Client, dataset: Path, fast_path: Path) -> None:
    plan = oocattn.plan(
        dataset, causal=True, scale=0.5, dtype="float16", device_memory="1GiB", host_memory=2 << 30, chunks=5,
        decomposition="strips", kernel="reference", lanes=2, result=fast_path / "out.zarr",
    )  # fmt: skip
    problem = plan.problem
    assert (problem.causal, problem.scale, problem.out_dtype) == (True, 0.5, "float16")
    assert (plan.device_memory, plan.host_memory) == (1 << 30, 2 << 30)
    assert (plan.chunks, plan.decomposition, plan.kernel, plan.lanes) == (5, "strips", "reference", 2)
    result = oocattn.attention(
        dataset, fast_path / "out.zarr", causal=True, scale=0.5, dtype="float16", chunks=5, kernel="reference", client=client
    )
    expected, _ = attention64(*normal_arrays(130, heads=4, kv_heads=2, head_dim=16), True, 0.5)
    assert relative_error(result.out[...], expected) < 3e-4


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_the_cpu_attends(dataset: Path) -> None:
    plan = oocattn.plan(dataset)
    assert (plan.device, plan.kernel, plan.lanes) == ("cpu", "cpu", 1)
    assert all(link.name != "copy" for link in plan.links)


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("kernel", [name for name in kernel_names() if device_type(name) == "cuda"])
def test_a_kernel_for_gpus_without_a_gpu_is_refused_in_words(fast_path: Path, kernel: str) -> None:
    dataset = write_dataset(fast_path / "half.zarr", normal_arrays(50, head_dim=64, dtype="float16"))
    words = f"kernel '{kernel}' cannot attend float16 with D = 64 on cuda: torch finds no NVIDIA GPU"
    with pytest.raises(ProblemError, match=words):
        oocattn.plan(dataset, kernel=kernel)
    with pytest.raises(ProblemError, match=words):
        oocattn.attention(dataset, fast_path / "out.zarr", kernel=kernel)
    assert sorted(path.name for path in fast_path.iterdir()) == ["half.zarr"]


def test_a_result_that_is_there_costs_no_start(dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = oocattn.attention(dataset, fast_path / "out.zarr", engine="inline")

    def start(*_: object) -> None:
        raise AssertionError("something was started")

    for name in ("pipelines.workplace.warm_up", "pipelines.workplace.rehearse", "planning.measure.describe_hardware"):
        monkeypatch.setattr(f"oocattn.{name}", start)
    monkeypatch.setattr("oocattn.pipelines.engines.dask.engine.local_engine", start)
    assert oocattn.attention(dataset, fast_path / "out.zarr").report == result.report
    with pytest.raises(ResultExistsError, match="its problem differs"):
        oocattn.attention(dataset, fast_path / "out.zarr", causal=True)
    with pytest.raises(ResultExistsError, match="belongs to the dataset"):
        oocattn.attention(dataset, dataset / "q", overwrite=True)


def test_planning_writes_nothing(dataset: Path, fast_path: Path) -> None:
    oocattn.plan(dataset, result=fast_path / "no" / "such" / "out.zarr")
    assert [path.name for path in fast_path.iterdir()] == ["dataset.zarr"]


def test_a_plan_prices_the_tasks_of_its_engine(dataset: Path, fast_path: Path) -> None:
    started: list[oocattn.Plan] = []

    def note(event: Event) -> None:
        if isinstance(event, Started):
            started.append(event.plan)

    oocattn.attention(dataset, fast_path / "out.zarr", engine="inline", callbacks=[note])
    inline, dask = (oocattn.plan(dataset, engine=engine).machine.task_seconds for engine in ("inline", "dask"))
    assert started[0].machine.task_seconds == inline < dask


@pytest.mark.parametrize(("dtype", "partials"), [("float16", "memory"), ("float32", "disk")])
def test_a_run_reads_and_writes_what_its_plan_says(fast_path: Path, dtype: str, partials: str) -> None:
    dataset = fast_path / "dataset.zarr"
    synthesise(dataset, tokens=2003, heads=4, kv_heads=2, head_dim=24, dtype=dtype)
    strips = {"chunks": 9, "causal": True, "decomposition": "strips"}  # they keep nothing on disk
    window, documents = (
        {"chunks": 13, "window_size": (300, 100)},
        {"chunks": 7, "cu_seqlens_q": [0, 500, 2003], "causal": True},
    )
    last = strips if partials == "memory" else {"chunks": 8}
    for options in ({"chunks": 13}, {"chunks": 7, "causal": True}, window, documents, last):
        plan = plan_for(dataset, partials="disk" if partials == "disk" else None, **options)
        report = carry_out(plan, dataset, fast_path / "result.zarr", overwrite=True).report
        amounts = {link.name: link.amount for link in plan.links}
        assert 0.85 * amounts["read"] <= report.bytes_read <= amounts["read"]
        assert report.bytes_written == amounts["write"]
        assert (report.bytes_partials > 0) == (partials == "disk")
        assert report.subproblems == plan.subproblems
        assert report.tokens == 2003


# The same bits, whoever computes them


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[tuple[int, int], Client]]:
    """Clusters in this process, by their workers and threads of each."""
    with ExitStack() as stack:
        yield {sizes: stack.enter_context(cluster_of(*sizes, processes=False)) for sizes in ((1, 1), (1, 4), (2, 2))}


@contextmanager
def cluster_of(workers: int, threads: int, processes: bool) -> Iterator[Client]:
    options = {"n_workers": workers, "threads_per_worker": threads, "processes": processes, "memory_limit": 0}
    with LocalCluster(**options, dashboard_address=None) as cluster, Client(cluster, set_as_default=False) as connected:
        yield connected


WINDOW = {"causal": True, "window_size": (60, 0), "sink_tokens": 2, "alibi_slopes": [0.1, 0.2, 0.0, 0.3]}
DOCUMENTS = {"cu_seqlens_q": [0, 90, 90, 110, 301], "learnable_sink": [0.0, 1.0, -1.0, 2.0], "queries": (20, 299)}


@pytest.mark.parametrize(
    ("options", "asked", "places"),
    [
        ({"chunks": 7}, {"causal": True}, ("memory", "disk", "memory")),
        ({"chunks": 8}, {}, ("disk", "memory", "disk")),
        ({"chunks": 5, "decomposition": "strips"}, {"causal": True}, (None, None, None)),
        ({"chunks": 13, "decomposition": "cqs"}, WINDOW, ("memory", "disk", "memory")),
        ({"chunks": 7, "decomposition": "cqs"}, DOCUMENTS, ("disk", "memory", "disk")),
        ({"chunks": 6, "decomposition": "strips"}, DOCUMENTS, (None, None, None)),
    ],
    ids=["causal", "full", "causal strips", "window", "documents", "documents strips"],
)
def test_bits_do_not_depend_on_workers_threads_or_the_place_of_partials(
    clients: dict[tuple[int, int], Client],
    fast_path: Path,
    options: dict[str, Any],
    asked: dict[str, Any],
    places: tuple[str | None, ...],
) -> None:
    """On each cluster with partials in one place: over the cases, in both."""
    dataset = fast_path / "dataset.zarr"
    synthesise(dataset, tokens=301, heads=4, kv_heads=2, head_dim=40, dtype="bfloat16")
    plan = plan_for(dataset, **asked, **options)
    expected = bits(carry_out(plan, dataset, fast_path / "first.zarr"))
    before = torch.get_num_threads()
    for ((workers, threads), connected), place in zip(clients.items(), places, strict=True):
        same = replanned(with_partials(plan, place) if place else plan, threads=threads, lanes=workers)
        found = bits(carry_out(same, dataset, fast_path / "result.zarr", connected, overwrite=True))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_processes(fast_path: Path) -> None:
    dataset = fast_path / "dataset.zarr"
    synthesise(dataset, tokens=901, heads=6, kv_heads=3, head_dim=32, dtype="float32")
    plan = plan_for(dataset, causal=True, chunks=7)
    expected = bits(carry_out(plan, dataset, fast_path / "first.zarr"))
    with cluster_of(2, 2, processes=True) as connected:
        for place in ("memory", "disk"):
            same = replanned(with_partials(plan, place), lanes=2)
            result = carry_out(same, dataset, fast_path / "result.zarr", connected, overwrite=True)
            np.testing.assert_array_equal(bits(result)[0], expected[0])
            np.testing.assert_array_equal(bits(result)[1], expected[1])
            assert result.report.lanes == 2
