"""A run does not begin on a cluster that is not ready: other data, other folders, other software, no memory, no workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Status
from interrupting import uninterrupted
from support import BESIDE, Unlocked, a_problem, assert_same_bits, carry_out, plan_for
from worker_processes import cluster_of, command, start

import oocattn
from oocattn import Event, ProblemError, TimeLimitError
from oocattn.cli import main as cli
from oocattn.pipelines.engines.dask import cluster, enlisting
from oocattn.pipelines.engines.dask.enlisting import Roll
from oocattn.pipelines.engines.dask.readiness import (
    NAMES,
    PACKAGES,
    Expectations,
    WorkerState,
    describe_interpreter,
    find_faults,
    find_interpreter_faults,
)
from oocattn.pipelines.engines.dask.worker_share import Memory
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import Fingerprints
from oocattn.storage.paths import ResultPaths
from oocattn.version import source_digest

EXPECTED = Expectations(
    Dataset("/d.zarr", {}),
    Fingerprints("q1-k1-v1", "", "q-k-v"),
    Path("/r.zarr.oocattn"),
    Unlocked(),
    100,
    ("cpu", a_problem(9), "cpu"),
)
COMPUTING = {"cpu": "AVX2", "arithmetic": "a"}
GOOD = WorkerState("id", source_digest(), EXPECTED.fingerprints, "", "ready", False, Memory(10, 0, inf), COMPUTING)

HERE = {"host": "here", "Python": "3.11", "oocattn": "1.0", "torch": "2.11.0+cpu", "dask": "2026.1"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"dataset": "no such folder"}, ["cannot read the dataset /d.zarr as it can be read here: no such folder"]),
        ({"dataset": Fingerprints("q2-k1-v1", "", "q2-k-v")}, ["sees other data in q of the dataset /d.zarr than is here"]),
        (
            {"dataset": Fingerprints("q1-k2-v2", "", "q-k-v")},
            ["sees k and v of the dataset /d.zarr with other modification times than here, and may have an old copy: mount"],
        ),
        ({"dataset": Fingerprints("q1-k1-v1", "another inode", "q-k-v")}, []),
        ({"code": "another"}, [f"has oocattn {oocattn.__version__} with other code than here: install there what is here"]),
        ({"computing": {**COMPUTING, "gpu": "none"}}, ["sees no GPU: start it where there is one, or choose kernel='cpu'"]),
        ({"result": "cannot write to /r"}, ["cannot write to /r: choose a result on a file system that all workers share"]),
        (
            {"paused": True, "memory": Memory(10, 20, inf)},
            ["is paused by Dask, with 10 B of its memory limit of 20 B in use: restart"],
        ),
        (
            {"memory": Memory(10, 120, 96.0)},
            ["has a memory limit of 120 B, of which 10 B are in use: a lane takes 100 B more, .*memory_limit=0 or a larger"],
        ),
        ({"memory": Memory(10, 200, 160.0)}, []),
        ({"computing": {"cpu": "AVX512", "arithmetic": "a"}}, ["computes with cpu AVX512 instead of AVX2 | NEON"]),
        ({"computing": {"cpu": "NEON", "arithmetic": "b"}}, ["computes with other bits of a test call, so"]),
        (
            {"dataset": "gone", "result": "cannot write to /r", "paused": True},
            ["cannot read the dataset", "cannot write to /r", "is paused by Dask"],
        ),
    ],
)
def test_what_keeps_a_worker_from_a_run(changed: dict[str, Any], words: list[str]) -> None:
    expected = replace(EXPECTED, computing={"cpu": "AVX2 | NEON", "arithmetic": "a"})
    found = find_faults(replace(GOOD, **changed), expected, written=True)
    assert len(found) == len(words)
    for text, beginning in zip(found, words, strict=True):
        assert beginning.partition(".*")[0] in text
        assert beginning.partition(".*")[2] in text


def test_what_a_worker_writes_must_appear_beside_the_result() -> None:
    (found,) = find_faults(GOOD, EXPECTED, written=False)
    assert found.startswith("writes to /r.zarr.oocattn, and nothing of that appears here: choose a result")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"host": "there"}, ""),
        ({"torch": "2.11.0+cu130"}, ""),
        ({"torch": "2.10.0+cpu"}, "has torch 2.10.0+cpu instead of 2.11.0+cpu: install there what is here"),
        ({"Python": "3.12", "dask": "2025.1"}, "has Python 3.12 instead of 3.11 and dask 2025.1 instead of 2026.1: install"),
        ({"oocattn": "none (ModuleNotFoundError: No)"}, "has no oocattn (ModuleNotFoundError: No): install there what is"),
    ],
)
def test_which_software_is_other_than_here(changed: dict[str, str], words: str) -> None:
    found = find_interpreter_faults({**HERE, **changed}, HERE)
    assert found[0].startswith(words) if words else not found


def test_a_worker_is_asked_for_its_software_by_text_that_needs_nothing() -> None:
    alone: dict[str, Any] = {}
    exec(NAMES["source"], alone)
    assert alone["describe_interpreter"](PACKAGES) == describe_interpreter(PACKAGES)
    assert "No module named 'nowhere'" in alone["describe_interpreter"](("nowhere",))["nowhere"]


STUBS = {
    "older": "__version__ = '0.0.1'",
    "absent": "raise ModuleNotFoundError(\"No module named 'oocattn'\")",
    "empty": "import sys; __version__ = 'VERSION'; sys.modules['oocattn.pipelines'] = None",
}
"""What workers have in the place of the package; the last one says that it is this version, and is not."""


def test_workers_with_other_software_are_all_named(dataset: Path, result: Path, fast_path: Path) -> None:
    with cluster_of(3) as (client, ending):
        for name, text in STUBS.items():
            (fast_path / name / "oocattn").mkdir(parents=True)
            (fast_path / name / "oocattn/__init__.py").write_text(text.replace("VERSION", oocattn.__version__))
            start(ending, command(client.scheduler.address), PYTHONPATH=str(fast_path / name))
        client.wait_for_workers(3, timeout=60)
        with pytest.raises(ProblemError) as refused:
            carry_out(plan_for(dataset), dataset, result, client)
        text = str(refused.value)
    assert f"has oocattn 0.0.1 instead of {oocattn.__version__}: install there what is here" in text
    assert "has no oocattn (ModuleNotFoundError: No module named 'oocattn'): install there what is here" in text
    assert "No module named 'oocattn.pipelines" in text
    assert text.count("worker tcp://") == 3
    assert not os.path.lexists(ResultPaths.at(result).state)


def test_workers_without_the_package_that_join_a_run_neither_harm_it_nor_are_harmed(
    dataset: Path, result: Path, fast_path: Path, client: Client
) -> None:
    (fast_path / "absent/oocattn").mkdir(parents=True)
    (fast_path / "absent/oocattn/__init__.py").write_text(STUBS["absent"])
    plan = plan_for(dataset, chunks=13)
    with cluster_of(1) as (connected, ending):
        start(ending, command(connected.scheduler.address), PYTHONPATH=str(Path(oocattn.__file__).parents[1]))
        connected.wait_for_workers(1, timeout=60)

        def join(event: Event) -> None:
            if event.kind == "started" or (event.kind == "attended" and event.index == 3):
                start(ending, command(connected.scheduler.address), PYTHONPATH=str(fast_path / "absent"))
                connected.wait_for_workers(len(connected.nthreads()) + 1, timeout=60)

        found = carry_out(plan, dataset, result, connected, callbacks=[join])
        assert len(connected.nthreads()) == 3
    assert_same_bits(found, uninterrupted(plan, dataset))
    assert (found.report.retried, found.report.workers_lost) == (0, 0)


def test_a_scheduler_without_the_package_is_named(
    dataset: Path, result: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**describe_interpreter(PACKAGES), "oocattn": "none (ModuleNotFoundError: no)"}

    async def answer(*_: object) -> dict[str, str]:
        return other

    monkeypatch.setattr(client, "run_on_scheduler", answer)
    with pytest.raises(ProblemError, match=r"the scheduler has no oocattn \(ModuleNotFoundError: no\): install there"):
        carry_out(plan_for(dataset), dataset, result, client)


@contextmanager
def in_process(**options: Any) -> Iterator[tuple[LocalCluster, Client]]:
    """A cluster of threads."""
    with (
        LocalCluster(processes=False, dashboard_address="127.0.0.1:0", threads_per_worker=2, **options) as own,
        Client(own, set_as_default=False) as client,
    ):
        yield own, client


def test_paused_workers_and_small_limits_are_told(dataset: Path, result: Path) -> None:
    with in_process(n_workers=2, memory_limit="64 GiB") as (own, client):
        paused, small = own.workers.values()
        for worker in (paused, small):
            worker.periodic_callbacks["memory_monitor"].stop()
        paused.status = Status.paused
        small.memory_manager.memory_limit = 1 << 20
        with pytest.raises(ProblemError) as refused:
            carry_out(plan_for(dataset), dataset, result, client)
        paused.status = Status.running
    text = str(refused.value)
    assert f"worker {paused.address} (host " in text
    assert "is paused by Dask, with " in text
    assert f"worker {small.address} (host " in text
    assert "has a memory limit of 1 MiB, of which " in text


def test_many_workers_with_the_same_fault_are_told_once(
    dataset: Path, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = str(Roll({}, {f"worker tcp://{number}": ["is gone"] for number in range(25)}))
    assert text.startswith("worker tcp://0, worker tcp://1, ")
    assert text.endswith("worker tcp://19 and 5 more is gone")


def test_workers_that_compute_otherwise_than_the_first_are_told(caplog: pytest.LogCaptureFixture) -> None:
    roll = Roll({"a": GOOD, "b": replace(GOOD, computing={"cpu": "NEON", "arithmetic": "a"})})
    assert roll.computing == {"cpu": "AVX2 | NEON", "arithmetic": "a"}


def test_a_worker_that_is_silent_is_named(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enlisting, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(enlisting, "LEAST_ANSWER_SECONDS", 0.3)
    with cluster_of(1) as (client, ending):
        start(ending, command(client.scheduler.address))
        client.wait_for_workers(1, timeout=60)
        ((address, process),) = client.run(os.getpid).items()
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(ProblemError, match=f"not ready for this run: worker {address} does not answer for 0.5 s"):
                carry_out(plan_for(dataset), dataset, result, client)
        finally:
            os.kill(process, signal.SIGCONT)


def test_an_adaptive_cluster_without_workers_is_waited_for(
    dataset: Path, result: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "KEEPING_SECONDS", 1.5)
    with in_process(n_workers=0) as (own, client):
        own.adapt(minimum=0, maximum=1, interval="100 ms")
        oocattn.attention(dataset, result, client=client, kernel="cpu")
    assert "the cluster has no worker: waiting for one, 60 s at most" in caplog.text


def test_a_run_does_not_wait_for_workers_beyond_its_time_limit(dataset: Path, result: Path) -> None:
    began = time.monotonic()
    with (
        in_process(n_workers=0) as (_, client),
        pytest.raises(TimeLimitError, match="time limit reached while it waited for a first worker: nothing was begun"),
    ):
        oocattn.attention(dataset, result, client=client, time_limit=0.2)
    assert time.monotonic() - began < 10
    assert not os.path.lexists(ResultPaths.at(result).state)


def test_the_command_says_in_one_line_that_a_cluster_is_not_ready(
    dataset: Path, result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "FIRST_WORKER_SECONDS", 0.2)
    with LocalCluster(n_workers=0, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1") as own:
        assert cli.main(["run", str(dataset), str(result), "--scheduler", own.scheduler_address]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        "oocattn: 0 workers after 0.2 s: a run needs at least one; start workers and run again (if Dask keeps restarting "
        "them, set memory_limit=0)"
    )


def test_what_readiness_wrote_is_gone(dataset: Path, result: Path, client: Client) -> None:
    carry_out(plan_for(dataset), dataset, result, client)
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE
