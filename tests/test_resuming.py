"""What was done is not done again, and a resumed run gives the bits of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from interrupting import TOKENS, EnoughError, interrupt, interrupted, uninterrupted, write_resuming_dataset
from support import (
    BESIDE,
    Recorder,
    assert_same_bits,
    carry_out,
    normal_arrays,
    plan_for,
    read_again,
    write_dataset,
)

import oocattn
from oocattn import ProblemError
from oocattn.cli.main import main
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.planning.measure import count_lanes
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_resuming_dataset(fast_path)


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(
    ("kind", "count", "causal"),
    [("staged", 1, True), ("attended", 9, False), ("merged", 3, True), ("written", 5, False), ("written", 12, True)],
)
def test_a_resumed_run_gives_the_same_bits(
    dataset: Path,
    result: Path,
    partials: str,
    kind: str,
    count: int,
    causal: bool,
) -> None:
    plan = plan_for(dataset, chunks=7, causal=causal, partials=partials)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, kind, count)
    recorder = Recorder([])
    found = oocattn.resume(result, engine="inline", callbacks=[recorder])
    assert_same_bits(found, right)
    assert {**found.out.attrs, "lse": {**found.lse.attrs}} == {**right.out.attrs, "lse": {**right.lse.attrs}}  # checksums
    assert found.report.pairs == right.report.pairs
    assert found.report.bytes_written == right.report.bytes_written
    redone = len(recorder.of("attended"))
    assert recorder.of("started")[0].left == redone
    if kind == "written":
        assert len(recorder.of("written")) <= len([chunk for chunk in range(7) if plan.query_rows(chunk)]) * 2 - count
        assert 0 < found.report.pairs_before <= found.report.pairs
        assert "of the pairs were attended before" in str(found.report)
    assert redone <= plan.subproblems - (count if kind == "attended" else 0)
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_run_may_be_interrupted_many_times(
    dataset: Path,
    result: Path,
    partials: str,
) -> None:
    plan = plan_for(dataset, chunks=7, partials=partials)
    right = uninterrupted(plan, dataset)
    for _ in range(5):  # what is in flight then is finished, too: some three subproblems
        interrupted(plan, dataset, result, "attended", 1)
    recorder = Recorder([])
    assert_same_bits(oocattn.resume(result, engine="inline", callbacks=[recorder]), right)
    assert len(recorder.of("attended")) <= plan.subproblems - 5


def test_a_plan_for_many_lanes_starts_no_more_than_this_machine_has(
    dataset: Path,
    result: Path,
    client: Client,
) -> None:
    plan = plan_for(dataset, chunks=7, lanes=1024)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, client=client)
    found = oocattn.resume(result)
    assert found.report.lanes == count_lanes("cpu")
    assert_same_bits(found, right)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_run_is_resumed_on_fewer_or_more_workers(
    dataset: Path,
    result: Path,
    partials: str,
) -> None:
    """On more than were planned for, it takes only as many as its budgets have room for."""
    roomy = plan_for(dataset, chunks=7, partials=partials, lanes=2)
    tight = replace(roomy, host_memory=roomy.peak_host, device_memory=roomy.peak_device)
    right = uninterrupted(roomy, dataset)
    for plan, workers, expected in ((roomy, 1, 1), (roomy, 3, 3), (tight, 3, 2)):
        path = result.with_name(f"{workers}-{expected}.zarr")
        with local_client(workers=2) as two:
            interrupted(plan, dataset, path, "written", 4, client=two)
        with local_client(workers=workers) as others:
            found = oocattn.resume(path, client=others)
        assert found.report.lanes == expected
        assert_same_bits(found, right)


def test_the_same_call_resumes_and_the_command_says_so(
    dataset: Path, result: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"chunks": 7, "decomposition": "cqs", "causal": True, "host_memory": "1GiB"}
    right = oocattn.attention(dataset, result.with_name("right.zarr"), engine="inline", **options)
    attempts: list[Callable[[Path], object]] = [
        lambda path: oocattn.attention(dataset, path, engine="inline", **options),
        lambda path: main(["run", str(dataset), str(path), "--causal"]),
        lambda path: main(["resume", str(path)]),
    ]
    for number, again in enumerate(attempts):
        path = result.with_name(f"{number}.zarr")
        with pytest.raises(EnoughError):
            oocattn.attention(dataset, path, engine="inline", callbacks=[interrupt("written", 8)], **options)
        capsys.readouterr()
        caplog.clear()
        again(path)
        assert (f"{path}: resuming the unfinished run" in caplog.text) == (number < 2)
        printed = capsys.readouterr().out
        assert_same_bits(oocattn.resume(path), right)  # finished: it is returned as it is
        assert bool(printed) == bool(number)
        if printed:
            assert "of 14 subproblems are left" in printed
            assert "of the pairs were attended before" in printed


def test_an_overwriting_run_can_be_resumed(dataset: Path, result: Path) -> None:
    full, causal = plan_for(dataset, chunks=7), plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(causal, dataset)
    carry_out(full, dataset, result)
    with pytest.raises(EnoughError):
        carry_out(causal, dataset, result, callbacks=[interrupt("written", 3)], overwrite=True)
    assert_same_bits(oocattn.resume(result, engine="inline"), right)


def test_a_resumed_run_counts_nan_and_inf_once(fast_path: Path, result: Path) -> None:
    arrays = normal_arrays(TOKENS, heads=4, kv_heads=2)
    for array, place in zip(arrays, ([0, 1, 5, 0], [0, 1, 60, 2], [0, 0, 120, 3]), strict=True):
        array[tuple(place)] = np.nan
    dataset = write_dataset(fast_path / "nan.zarr", arrays)
    for partials in ("memory", "disk"):
        plan = plan_for(dataset, chunks=7, causal=True, partials=partials)
        path = result.with_name(partials)
        for count in (2, 2, 2):
            interrupted(plan, dataset, path, "written", count)
        assert oocattn.resume(path, engine="inline").report.not_finite == 3


def test_a_run_is_resumed_with_the_name_of_a_dataset_that_was_moved(
    dataset: Path,
    result: Path,
) -> None:
    plan = plan_for(dataset, chunks=7)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result)
    moved = dataset.rename(dataset.with_name("moved.zarr"))
    with pytest.raises(ProblemError, match="no Zarr group at"):
        oocattn.resume(result, engine="inline")
    assert_same_bits(oocattn.resume(result, engine="inline", inputs=moved), right)


def test_a_plan_survives_its_journal(dataset: Path) -> None:
    plans = [
        plan_for(dataset, causal=True, **options) for options in ({"chunks": 7}, {"chunks": 5, "decomposition": "strips"})
    ]
    arrays = {"cu_seqlens_q": [0, 20, 20, TOKENS], "alibi_slopes": [0.5, 0.25, 0.1, 0.0], "learnable_sink": [1.0] * 4}
    plans.append(plan_for(dataset, window_size=(None, 3), softcap=2.0, heads=(0, 2), queries=(7, 90), **arrays))
    most = oocattn.plan(dataset, host_memory=2**96, device_memory=2**96, checkpoint_interval=1e9, lanes=5000, kernel="cpu")
    for plan in (*plans, most):
        assert read_again(plan) == plan
