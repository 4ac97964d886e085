"""Whatever step of a run fails: once is survived with the same bits; always ends the run soon, with the reason."""

from __future__ import annotations

import errno
import itertools
import math
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from support import TOKENS, Recorder, assert_same_bits, carry_out, normal_arrays, plan_for, replanned, write_dataset

import oocattn
from oocattn import Event, Plan, Result, StalledError, TaskError
from oocattn.pipelines import attempt, deadline
from oocattn.pipelines.engines.dask.engine import DaskLanes
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.memory import MemoryPartials
from oocattn.pipelines.lane.stager import Stager
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import RunState

SECONDS = 20
"""In which a run must end that cannot go on."""

Break = Callable[[pytest.MonkeyPatch, Callable[[], object]], None]
"""Has a step of a run call a function first, which may raise."""


def method(owner: type, name: str) -> Break:
    """The step is a method."""

    def break_it(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> None:
        real = getattr(owner, name)

        def broken(*arguments: Any, **options: Any) -> Any:
            fail()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, broken)

    return break_it


def writing(pattern: str) -> Break:
    """The step is the durable write of a file whose path has this in it."""

    def break_it(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> None:
        real = os.replace

        def broken(source: Any, target: Any, **folders: int) -> None:
            folder = folders.get("dst_dir_fd")
            if pattern in ("" if folder is None else os.readlink(f"/proc/self/fd/{folder}")) + f"/{target}":
                fail()
            real(source, target, **folders)

        monkeypatch.setattr(os, "replace", broken)

    return break_it


STEPS: dict[str, tuple[Break, str]] = {
    "the dataset's chunks": (method(ZarrSource, "read_rows"), "subproblem .* of head group"),
    "staging": (method(Stager, "stage"), "subproblem .* of head group"),
    "attending": (method(CpuDevice, "launch"), "subproblem .* of head group"),
    "the start of attending": (method(Lane, "attend"), "subproblem .* of head group"),
    "merging": (method(Finisher, "merge"), "query chunk .* of head group"),
    "dividing": (method(CpuDevice, "finalise"), "query chunk .* of head group"),
    "writing": (method(ResultArrays, "write"), "query chunk .* of head group"),
    "a chunk's file": (writing("/out/c"), "query chunk .* of head group"),
    "a partial's file": (writing("/partial-"), "subproblem .* of head group"),
    "a checkpoint": (method(MemoryPartials, "save"), "a checkpoint"),
    "the journal": (writing("/finished/"), "query chunk .* of head group"),
    "the set-up of a lane": (method(Lane, "__init__"), "the set-up of a lane"),
    "asking workers to open lanes": (method(DaskLanes, "open"), "the set-up of a lane"),
    "submitting tasks": (method(Client, "get"), "the submission of tasks"),
    "a lane's memory": (method(CpuDevice, "allocate"), "the set-up of a lane"),
    "the check of the dataset": (method(Dataset, "fingerprint"), "the check of the dataset"),
    "the checksums": (writing("/zarr.json"), "the commit of the result"),
    "the report": (writing("/report.json"), "the commit of the result"),
    "the commit": (method(RunState, "commit"), "the commit of the result"),
}
"""What may fail, and the place that the run's error names."""

ERRORS: list[Exception] = [
    OSError(errno.EIO, os.strerror(errno.EIO)),
    RuntimeError("it broke"),
    ValueError("no such value"),
    MemoryError("no room"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("retries") / "dataset.zarr", normal_arrays(TOKENS), chunk_rows=16)


@pytest.fixture(scope="module")
def right(dataset: Path) -> Result:
    return carry_out(plan_of(dataset, ""), dataset, dataset.with_name("right.zarr"))


def plan_of(dataset: Path, step: str) -> Plan:
    """A plan in which the step occurs."""
    plan = plan_for(dataset, chunks=3, causal=True, partials="disk" if step == "a partial's file" else "memory")
    return replanned(plan, checkpoint_seconds=1e-3)


class Trouble:
    """Fails so many times, from the beginning of a run on; a listener, so that it knows."""

    def __init__(self, error: Exception, times: float) -> None:
        self._error = error
        self._times = times
        self._begun = False
        self._lock = threading.Lock()
        self.raised = 0

    def __call__(self, event: Event) -> None:
        self._begun = True

    def begin(self) -> None:
        self._begun = True
        self.fail()

    def fail(self) -> None:
        with self._lock:
            if self._begun and self.raised < self._times:
                self.raised += 1
                raise type(self._error)(*self._error.args)


ONCE = [(step, ERRORS[number % len(ERRORS)]) for number, step in enumerate(STEPS)]
THE_OTHERS = [(step, error) for step in STEPS for error in ERRORS if (step, error) not in ONCE]


@pytest.mark.parametrize(
    ("step", "error"), [*ONCE, *(pytest.param(*case, marks=pytest.mark.slow) for case in THE_OTHERS)], ids=str
)
def test_a_step_that_fails_once_costs_nothing_but_time(
    client: Client, dataset: Path, right: Result, result: Path, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(error, times=1)
    STEPS[step][0](monkeypatch, trouble.fail)
    found = carry_out(plan_of(dataset, step), dataset, result, client, callbacks=[trouble])
    assert trouble.raised == 1
    assert_same_bits(found, right)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_always_fails_ends_the_run_with_the_reason(
    client: Client, dataset: Path, right: Result, result: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, place = STEPS[step]
    trouble = Trouble(OSError(errno.EIO, "the disk is on fire"), times=math.inf)
    began = time.monotonic()
    with monkeypatch.context() as patched:
        break_it(patched, trouble.fail)
        with pytest.raises(TaskError, match=rf"^{place}.* failed: (OSError: )?.*on fire"):
            carry_out(plan_of(dataset, step), dataset, result, client, callbacks=[trouble])
    assert time.monotonic() - began < SECONDS
    status = oocattn.status(result)
    assert status.state == "interrupted"
    assert "on fire" in status.error
    assert_same_bits(oocattn.resume(result, client=client), right)


def test_a_folder_that_cannot_be_searched_ends_the_run_with_the_reason(
    client: Client, dataset: Path, right: Result, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for times in (math.inf, 2):
        trouble = Trouble(OSError(errno.EIO, "the disk is on fire"), times)
        with monkeypatch.context() as patched:
            method(PartialFiles, "scan")(patched, trouble.begin)
            if times == 2:
                assert_same_bits(carry_out(plan_of(dataset, ""), dataset, result, client), right)
            else:
                with pytest.raises(TaskError, match=r"^the search for finished work failed: (OSError: )?.*on fire"):
                    carry_out(plan_of(dataset, ""), dataset, result, client)
        assert oocattn.status(result).state == ("interrupted" if times == math.inf else "finished")


def test_a_status_that_cannot_be_written_is_no_trouble(
    client: Client, dataset: Path, right: Result, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(ERRORS[0], times=math.inf)
    writing("/status.json")(monkeypatch, trouble.begin)
    found = carry_out(plan_of(dataset, ""), dataset, result, client)
    assert trouble.raised
    assert_same_bits(found, right)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_limit_on_the_size_of_files_ends_the_run_with_that_reason(
    client: Client, fast_path: Path, result: Path, partials: str
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(1024, head_dim=32))
    plan = replanned(plan_for(dataset, chunks=7, partials=partials), checkpoint_seconds=0.1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))
    try:
        with pytest.raises(TaskError, match="File too large"):
            carry_out(plan, dataset, result, client)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert oocattn.status(result).state == "interrupted"
    assert oocattn.verify(oocattn.resume(result, client=client).path, rows=8).passed


def test_mishaps_without_progress_end_a_run_wherever_they_are(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that never come twice do not keep it going."""
    names = itertools.count()

    def fail(*_: object) -> None:
        raise TaskError(f"thing {next(names)}", "it broke")

    monkeypatch.setattr(Stager, "stage", fail)
    recorder = Recorder([])
    with pytest.raises(TaskError, match=r"^thing .* failed: it broke"):
        carry_out(plan_of(dataset, ""), dataset, result, client, callbacks=[recorder])
    assert len(recorder.of("recovered")) == 2


def test_a_task_that_hangs_ends_the_run_after_a_while(
    client: Client, dataset: Path, right: Result, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "STALLED_SECONDS", 0.5)
    monkeypatch.setattr(deadline, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(attempt, "WORKER_CHECK_SECONDS", 0.1)
    go_on = threading.Event()
    with monkeypatch.context() as patched:
        method(CpuDevice, "launch")(patched, go_on.wait)
        threading.Timer(2.0, go_on.set).start()
        with pytest.raises(
            StalledError, match=r"nothing has ended for .*: subproblem 0 of head group 0.* not end on worker "
        ):
            carry_out(plan_of(dataset, ""), dataset, result, client)
    assert_same_bits(oocattn.resume(result, client=client), right)
