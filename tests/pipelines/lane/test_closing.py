"""A closed lane has given its memory back, at once and whatever had become of its work; the process is as it was."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from support import normal_arrays, plan_for, replanned, run_of, write_dataset

from oocattn import BudgetError, Plan
from oocattn.operations import forward
from oocattn.pipelines.lane import cuda, cuda_memory, switching
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.lane.memory import HostMemory
from oocattn.pipelines.lane.partials import files as partial_files
from oocattn.pipelines.lane.stager import Stager
from oocattn.threads import begin_call

DEVICES = ["cpu", "cuda:0"]

Allocations = list["weakref.ref[Any]"]


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch, no_gc: None) -> Allocations:
    """What lanes allocate from now on, on either device; each is dead once its last view is gone."""
    found: Allocations = []

    def allocate(nbytes: int) -> torch.Tensor:
        memory = np.empty(nbytes, np.uint8)
        found.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    class Memory(pretend.Memory):
        def __init__(self, nbytes: int) -> None:
            self.tensor = allocate(nbytes)

    class Torch(pretend.Torch):
        def empty(self, nbytes: int, **_: object) -> torch.Tensor:
            return allocate(nbytes)

    pretend.pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(CpuDevice, "allocate", lambda _, nbytes: allocate(nbytes))
    monkeypatch.setattr(cuda, "PinnedMemory", Memory)
    monkeypatch.setattr(cuda_memory, "torch", Torch())
    return found


def living(allocations: Allocations) -> Allocations:
    """Those that are still there when the thread that unpins has done what it was given."""
    cuda_memory.pinning(torch.device("cpu")).submit(lambda: None).result()  # the pretended GPU's
    return [memory for memory in allocations if memory() is not None]


def plan_of(dataset: Path, device: str, partials: str = "memory") -> Plan:
    options: dict[str, Any] = {"partials": partials, "chunks": 3, "causal": True}
    return plan_for(dataset, **options) if device == "cpu" else pretend.gpu_plan(dataset, (6, 4), **options)


def lane_of(folder: Path, device: str, partials: str = "memory") -> Lane:
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(70, heads=2, kv_heads=1))
    return Lane(run_of(folder, plan_of(dataset, device, partials)), device)


def stage(lane: Lane) -> None:
    lane.stage(0, 0, 0)
    lane.stage(1, 0, 1)


def attend(lane: Lane) -> None:
    stage(lane)
    lane.attend(1)  # and the one before, which nobody asks for


def merge(lane: Lane) -> None:
    for turn in range(3):
        lane.stage(turn, 0, turn)
        lane.attend(turn)
    lane.merge(0, 1)


def write(lane: Lane) -> None:
    merge(lane)
    lane.write(0, 1)


def fail_to_write(lane: Lane) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(partial_files, "write_blocks", full)
        patched.setattr(forward, "merge", full)
        stage(lane)
        for turn in (1, 0):
            with pytest.raises(OSError, match="No space left"):
                lane.attend(turn)


def fail_to_divide(lane: Lane) -> None:
    """A chunk whose tasks never ask for it."""

    def broken(*_: object) -> None:
        raise ArithmeticError("broken")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "finalise", broken)
        for turn in range(3):
            lane.stage(turn, 0, turn)
            lane.attend(turn)
        if (0, 0) not in lane.finisher._chunks:  # a GPU begins it by itself
            lane.finisher.begin(0, 0, [len(lane.plan.query_rows(0))])
        assert isinstance(lane.finisher._chunks[0, 0].exception(), ArithmeticError)


def do_nothing(lane: Lane) -> None:
    """Close it as it is."""


WORK = [do_nothing, stage, attend, merge, write, fail_to_write, fail_to_divide]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("device", DEVICES)
def test_closing_a_lane_frees_its_memory_though_the_lane_is_held(
    fast_path: Path, allocations: Allocations, device: str, partials: str, work: Callable[[Lane], None]
) -> None:
    lane = lane_of(fast_path, device, partials)
    assert lane.memory._allocated is not None
    lane.memory._allocated.result()
    assert len(allocations) > 5
    work(lane)
    lane.close()
    assert not living(allocations)


@pytest.mark.parametrize("device", DEVICES)
def test_a_lane_that_cannot_be_made_frees_its_memory(
    fast_path: Path, allocations: Allocations, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def refuse(self: Stager, *_: object) -> None:
        raise BudgetError("no room for staging")

    monkeypatch.setattr(Stager, "__init__", refuse)
    interval, threads = sys.getswitchinterval(), set(threading.enumerate())
    with pytest.raises(BudgetError, match="no room for staging"):
        lane_of(fast_path, device)
    stay = ("oocattn-launch", "oocattn-pin", "zarr_io", "asyncio_")  # of a process, not of a lane
    assert not [thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith(stay)]
    assert not living(allocations)
    assert sys.getswitchinterval() == interval


def test_a_lane_for_which_no_thread_can_be_started_is_closed(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(HostMemory, "__init__", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        begin_call(lambda: lane_of(fast_path, "cpu")).result(timeout=30)


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_allocation_is_raised_where_memory_is_missing_and_the_rest_is_freed(
    fast_path: Path, allocations: Allocations, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def refuse(*_: object) -> None:
        raise BudgetError("no room for states")

    monkeypatch.setattr("oocattn.pipelines.lane.memory.Arena.state", refuse)
    monkeypatch.setattr(cuda_memory, "DeviceBuffers", lambda *_: None)
    lane = lane_of(fast_path, device)
    lane.stage(0, 0, 0)
    with pytest.raises(BudgetError, match="no room for states"):
        lane.stage(1, 0, 1)
    with pytest.raises(BudgetError, match="no room for states"):
        lane.attend(0)
    lane.close()
    assert not living(allocations)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("device", DEVICES)
def test_a_closed_lane_is_in_no_reference_circle(fast_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    lane = lane_of(fast_path, device)
    write(lane)
    lane.close()
    parts = [weakref.ref(part) for part in (lane, lane.device, lane.memory, lane.partials, lane.finisher)]
    del lane
    assert [part() for part in parts] == [None] * len(parts)


def threads_of_torch() -> int:
    """How many a thread that begins now is given."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


def test_torch_uses_as_many_threads_as_before_while_lanes_work_and_after(fast_path: Path) -> None:
    """Whether they are closed, in whichever order, or left behind."""
    before, found = (torch.get_num_threads(), threads_of_torch()), []
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(70))
    plan = replanned(plan_for(dataset, chunks=3), threads=before[1] + 1)
    lanes = [Lane(run_of(fast_path, plan, name), "cpu") for name in ("first.zarr", "second.zarr", "third.zarr")]
    attend_in = CpuDevice.launch

    def launch(device: CpuDevice, *arguments: Any) -> Any:
        found.append(torch.get_num_threads())
        return attend_in(device, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuDevice, "launch", launch)
        for lane in lanes:
            lane.stage(0, 0, 0)
            lane.attend(0)
            assert (torch.get_num_threads(), threads_of_torch()) == before
    assert found == [plan.threads] * 3
    for lane in lanes[:2]:
        lane.close()
    lanes.clear()
    assert (torch.get_num_threads(), threads_of_torch()) == before


@pytest.fixture
def python_interval() -> Iterator[float]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield sys.getswitchinterval()
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_the_switch_interval_is_put_back_with_the_last_lane(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, python_interval: float, order: tuple[int, int]
) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    lanes = [lane_of(fast_path / name, "cuda:0") for name in ("first", "second")]
    assert sys.getswitchinterval() == pytest.approx(switching.SWITCH_SECONDS)
    lanes[order[0]].close()
    assert sys.getswitchinterval() == pytest.approx(switching.SWITCH_SECONDS)
    lanes[order[1]].close()
    lanes[order[1]].close()  # says nothing more
    assert sys.getswitchinterval() == python_interval


class Owner:
    """Something that may be gone."""


def test_the_switch_interval_is_put_back_where_nobody_closed(python_interval: float) -> None:
    owner = Owner()
    switching.hold_short_interval(owner)
    assert sys.getswitchinterval() == pytest.approx(switching.SWITCH_SECONDS)
    del owner
    assert sys.getswitchinterval() == python_interval


def test_a_switch_interval_that_the_caller_sets_meanwhile_stays(python_interval: float) -> None:
    owner = Owner()
    end = switching.hold_short_interval(owner)
    sys.setswitchinterval(0.02)
    end()
    assert sys.getswitchinterval() == pytest.approx(0.02)


@pytest.mark.parametrize("microseconds", [1, 100, 499, 1001, 7003])
@pytest.mark.usefixtures("python_interval")
def test_any_switch_interval_is_put_back_to_the_microsecond(microseconds: int) -> None:
    """Python says that 100 microseconds are 9.999e-5 seconds, and would make 99 of those."""
    sys.setswitchinterval(microseconds * 1e-6 + 1e-7)
    before, owner = sys.getswitchinterval(), Owner()
    end = switching.hold_short_interval(owner)
    assert sys.getswitchinterval() <= before
    end()
    assert sys.getswitchinterval() == before
