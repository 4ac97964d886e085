"""Workers on machines of their own share a store with the driver, and nothing else: they come, are asked to end, and die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs
from distributed import Security
from interrupting import uninterrupted
from machines import Machines, machines
from object_store import BUCKET, objects_in
from support import Recorder, assert_same_bits, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, Plan, ProblemError
from oocattn.pipelines import attempt
from oocattn.pipelines.engines.dask.connecting import connect
from oocattn.pipelines.engines.dask.engine import IMPORT, DaskEngine
from oocattn.pipelines.existing import Request
from oocattn.pipelines.session import run_plan
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths

LANE_FOLDERS = "__import__('glob').glob('/tmp/scratch/**/oocattn-*', recursive=True)"  # as a worker sees them
BESIDE = {"attempts.json", "full-report.json", "report.html", "report.json"}


@pytest.fixture(autouse=True)
def _workers_are_often_looked_for(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.2)
    monkeypatch.setattr(attempt, "PROGRESS_SECONDS", 0.2)


@pytest.fixture(scope="module")
def data(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(300, heads=8, kv_heads=4))


@pytest.fixture(scope="module")
def several(data: Path) -> Iterator[Machines]:
    """Two machines that stay."""
    with started(data, "a", "b") as found:
        yield found


@contextmanager
def started(data: Path, *names: str) -> Iterator[Machines]:
    """Machines with a worker each, and the dataset in the store."""
    with machines() as found:
        upload(found, data)
        for name in names:
            found.start(name)
        found.wait(len(names))
        yield found


def upload(found: Machines, data: Path) -> None:
    s3fs.S3FileSystem(**found.s3).put(f"{data}/", f"{BUCKET}/dataset.zarr", recursive=True)


def run_in_store(found: Machines, plan: Plan, name: str, *callbacks: Any, **place: Any) -> oocattn.Result:
    """Run a plan on the workers, over the dataset in the store and to a result there.

    Names of results are each test's own: servers of moto in one process hold the same objects.
    """
    opened = Dataset.open(f"s3://{BUCKET}/dataset.zarr", storage_options=found.s3)
    paths = ResultPaths.at(f"s3://{BUCKET}/{name}.zarr", **{"scratch": "store", "storage_options": found.s3, **place})
    return run_plan(plan, Request(plan.problem, opened, paths), DaskEngine(found.client), callbacks=callbacks)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_workers_that_share_no_folder_give_the_same_bits(several: Machines, data: Path, partials: str, here: Path) -> None:
    plan = plan_for(data, chunks=7, causal=True, lanes=2, partials=partials)
    recorder = Recorder([])
    found = run_in_store(several, plan, partials, recorder)
    assert_same_bits(found, uninterrupted(plan, data))
    assert {event.worker for event in recorder.of("attended")} == {"a", "b"}
    assert {key.partition(".oocattn/")[2] for key in objects_in(several.s3, f"{partials}.zarr.oocattn")} == BESIDE
    assert not list(here.iterdir())
    assert not any(several.client.run(eval, LANE_FOLDERS).values())


def test_workers_that_share_no_folder_need_job_state_in_the_store(several: Machines, data: Path, here: Path) -> None:
    with pytest.raises(ProblemError, match=r"worker .* \(host a\), worker .* cannot write to .*: choose scratch='store'"):
        run_in_store(several, plan_for(data, chunks=7), "refused", scratch=None)
    assert not objects_in(several.s3, "refused.zarr")
    assert not list(here.iterdir())


@pytest.mark.parametrize("partials", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_worker_that_is_asked_to_end_hands_over_what_it_has(data: Path, partials: str) -> None:
    plan = plan_for(data, chunks=13, causal=True, lanes=2, partials=partials)
    recorder = Recorder([])
    with started(data, "a", "b") as found:

        def preempt(event: Event) -> None:
            if event.kind == "attended" and len(recorder.of("attended")) == 6:
                found.processes["a"].send_signal(signal.SIGTERM)

        result = run_in_store(found, plan, f"preempted-{partials}", recorder, preempt)
        assert found.processes["a"].wait(30) in (0, -signal.SIGTERM)
        assert_same_bits(result, uninterrupted(plan, data))
    (recovered,) = recorder.of("recovered")
    assert "was asked to end, and hands over what it has done" in recovered.error
    assert recovered.workers_lost == 1
    assert len(recorder.of("attended")) <= plan.subproblems  # nothing was computed twice


@pytest.mark.slow
def test_the_last_worker_may_leave_before_another_comes(data: Path) -> None:
    plan = plan_for(data, chunks=13, causal=True)
    recorder = Recorder([])
    with started(data, "a") as found:

        def exchange(event: Event) -> None:
            if event.kind == "attended" and len(recorder.of("attended")) == 6:
                found.processes["a"].send_signal(signal.SIGTERM)
                found.start("b")

        result = run_in_store(found, plan, "exchanged", recorder, exchange)
        assert_same_bits(result, uninterrupted(plan, data))
    assert {event.worker for event in recorder.of("attended")} == {"a", "b"}
    assert sum(event.workers_lost for event in recorder.of("recovered")) == 1


@pytest.mark.slow
def test_what_a_killed_worker_had_not_saved_is_computed_by_another(data: Path) -> None:
    plan = plan_for(data, chunks=13, causal=True, lanes=2, partials="memory")
    recorder = Recorder([])
    with started(data, "a", "b") as found:

        def kill(event: Event) -> None:
            if event.kind == "attended" and len(recorder.of("attended")) == 6:
                os.kill(found.processes["a"].pid, signal.SIGKILL)

        result = run_in_store(found, plan, "killed", recorder, kill)
        assert_same_bits(result, uninterrupted(plan, data))
    assert [event.workers_lost for event in recorder.of("recovered")] == [1]
    assert len(recorder.of("attended")) > plan.subproblems


@pytest.mark.slow
def test_machines_that_join_are_used_after_the_next_checkpoint(data: Path) -> None:
    plan = replace(plan_for(data, chunks=31, causal=True), checkpoint_seconds=0.4)
    recorder = Recorder([])
    with started(data, "a") as found:

        def join(event: Event) -> None:
            if event.kind == "attended" and len(recorder.of("attended")) == 4:
                found.start("b", count=2)
                found.wait(3)
                found.client.run(eval, IMPORT)  # else the run may end before they have done it

        result = run_in_store(found, plan, "joined", recorder, join)
        assert_same_bits(result, uninterrupted(plan, data))
    (recovered,) = recorder.of("recovered")
    assert recovered.error.startswith("2 workers joined")
    assert (recovered.workers_lost, result.report.lanes) == (0, 3)
    assert {event.worker for event in recorder.of("attended")} == {"a", "b-0", "b-1"}


def test_budgets_bind_on_each_machine(several: Machines, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"s3://{BUCKET}/dataset.zarr"
    asked: Any = {"client": several.client, "chunks": 7, "kernel": "cpu", "storage_options": several.s3, "scratch": "store"}
    found = oocattn.attention(url, f"s3://{BUCKET}/budgets.zarr", host_memory="64MiB", **asked)
    assert (found.plan.lanes, found.plan.sharing_lanes) == (2, 1)
    assert "on each machine" in str(found.plan)


@pytest.mark.slow
def test_a_cluster_with_certificates_is_used_and_needs_them(data: Path, tmp_path: Path) -> None:
    security = Security.temporary()
    names = ("tls_ca_file", "tls_worker_cert", "tls_worker_key")
    files = {name: tmp_path / f"{name}.pem" for name in names}
    for name, path in files.items():
        path.write_text(getattr(security, name))
    plan = plan_for(data, chunks=7, causal=True)
    recorder = Recorder([])
    with machines(security) as found:
        upload(found, data)
        options = [f"--{option}" for option in ("tls-ca-file", "tls-cert", "tls-key")]
        certificates = [f"/tmp/scratch/{path.name}" for path in files.values()]
        arguments = [text for pair in zip(options, certificates, strict=True) for text in pair]
        found.start("a", *arguments, copied=list(files.values()))
        found.wait(1)
        address = str(found.client.scheduler.address)
        assert address.startswith("tls://")
        result = run_in_store(found, plan, "encrypted", recorder)
        assert_same_bits(result, uninterrupted(plan, data))
        with pytest.raises(ProblemError, match="one with certificates is at tls://, and Dask's configuration names them"):
            connect(address, 5.0)
    assert {event.worker for event in recorder.of("attended")} == {"a"}
