"""A process that is stopped for half a minute: `status` says so within 15 seconds, and why; then the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import Recorder, normal_arrays, write_dataset
from worker_processes import cluster_of, command

import oocattn
from oocattn import Status

pytestmark = pytest.mark.slow

SLOWLY = """
import time
from oocattn.pipelines.lane.cpu import CpuDevice

attend, took = CpuDevice._attend_chunk, [{first}]

def attend_slowly(*given):
    time.sleep(took.pop() if took else 0.5)
    return attend(*given)

CpuDevice._attend_chunk = attend_slowly
"""
"""Makes a run of 40 pieces take 20 s, whatever the machine; the first one takes longer."""

RUN = """
import sys, oocattn
oocattn.attention(sys.argv[1], sys.argv[2], chunks=13, engine=sys.argv[3], dashboard_address="127.0.0.1:0")
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset.zarr", normal_arrays(130))


def seconds_until(holds: Callable[[Status], bool], result: Path, most: float) -> float:
    began = time.monotonic()
    while not holds(oocattn.status(result)):
        assert time.monotonic() - began < most, str(oocattn.status(result))
        time.sleep(0.2)
    return time.monotonic() - began


def stop_and_go(process: int, result: Path, words: str) -> None:
    """Stop a process once its run has begun, for 30 s."""
    seconds_until(lambda status: status.subproblems_done > 0, result, 120)
    os.kill(process, signal.SIGSTOP)
    try:
        took = seconds_until(lambda status: bool(status.stalled), result, 15)
        assert words in oocattn.status(result).stalled
        assert str(oocattn.status(result)).startswith("stalled: ")
        time.sleep(30 - took)
        stopped = oocattn.status(result)
        assert stopped.stalled
    finally:
        os.kill(process, signal.SIGCONT)
    seconds_until(lambda status: not status.stalled, result, 15)
    seconds_until(lambda status: status.share > stopped.share, result, 60)
    assert not oocattn.status(result).stalled


@pytest.mark.parametrize("engine", ["inline", "dask"])
def test_a_run_whose_process_is_stopped(dataset: Path, tmp_path: Path, engine: str) -> None:
    result = tmp_path / "result.zarr"
    script = SLOWLY.format(first=0.5) + RUN
    with subprocess.Popen([sys.executable, "-c", script, str(dataset), str(result), engine]) as run:
        try:
            stop_and_go(run.pid, result, f"process {run.pid} on host")
        finally:
            run.kill()


@contextmanager
def working(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_run_whose_worker_is_stopped(dataset: Path, tmp_path: Path) -> None:
    """Before that, its first piece takes longer than a worker may be silent: that is no stall."""
    result, recorder = tmp_path / "result.zarr", Recorder([])
    with cluster_of(1) as (client, ending):
        script = SLOWLY.format(first=10.0) + "from distributed.cli.dask_worker import main; main()"
        arguments = [sys.executable, "-c", script, *command(client.scheduler.address)[3:]]
        worker = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd="/")
        ending.callback(worker.wait)
        ending.callback(worker.kill)
        client.wait_for_workers(1, timeout=60)

        def run() -> None:
            oocattn.attention(dataset, result, chunks=13, client=client, callbacks=[recorder])

        with working(run):
            stop_and_go(worker.pid, result, "its process is stopped")
            stalled = recorder.of("stalled")
            assert [bool(event.reason) for event in stalled] == [True, False]
        assert oocattn.status(result).state == "finished"
