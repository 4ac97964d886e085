"""Workers of an adaptive cluster come while a run is under way, and go when they are idle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from interrupting import uninterrupted
from support import assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

from oocattn.pipelines import attempt


@pytest.mark.parametrize("partials", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_cluster_that_adapts_from_no_worker_to_four(
    fast_path: Path, result: Path, partials: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(attempt, "PROGRESS_SECONDS", 0.1)
    data = write_dataset(fast_path / "dataset.zarr", normal_arrays(3000, heads=8, kv_heads=8))
    plan = replace(plan_for(data, chunks=31, causal=True, partials=partials), checkpoint_seconds=0.2)
    with (
        LocalCluster(
            n_workers=0, processes=False, threads_per_worker=4, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as own,
        Client(own, set_as_default=False) as client,
    ):
        own.adapt(minimum=0, maximum=4, interval="200 ms", target_duration="20 ms")
        found = carry_out(plan, data, result, client)
    assert_same_bits(found, uninterrupted(plan, data))
    assert found.report.retried == 0
