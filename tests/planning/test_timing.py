"""What is measured on a busy machine is what work takes by itself."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import a_problem, normal_arrays, write_dataset

import oocattn
from oocattn.pipelines.watch import report as report_module
from oocattn.planning import kernel_rates, measure, timing
from oocattn.planning.kernel_rates import MOMENT, Sample, kernel_rate, measured_rate
from oocattn.planning.reading import Rate
from oocattn.problem.second_pass import Reduced, SecondPass


def test_waiting_for_a_core_does_not_count_and_other_waiting_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TASKS", tmp_path)
    (tmp_path / "1").mkdir()

    def wait(of_core: float) -> None:
        time.sleep(0.05)
        (tmp_path / "1" / "schedstat").write_text(f"0 {int(of_core * 1e9)} 1\n")

    wait(0.0)
    assert timing.undisturbed_seconds(lambda: wait(0.0)) >= 0.05
    began = time.perf_counter()
    assert timing.undisturbed_seconds(lambda: wait(0.04)) < time.perf_counter() - began - 0.015
    (tmp_path / "1" / "schedstat").write_text("damaged")
    assert timing.undisturbed_seconds(lambda: time.sleep(0.001)) >= 0.001


def test_threads_that_come_and_go_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TASKS", tmp_path)
    monkeypatch.setattr(timing, "count_cores", lambda: 1_000_000)

    def have_waited(**threads: float) -> None:
        for thread in tmp_path.iterdir():
            (thread / "schedstat").unlink()
            thread.rmdir()
        for name, seconds in threads.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "schedstat").write_text(f"0 {round(seconds * 1e9)} 1\n")

    have_waited(a=10.0)
    clock = timing.CoreClock()
    have_waited(a=10.01, b=0.02)
    clock.read()
    have_waited(b=0.01)  # another thread of that number
    clock.read()
    have_waited(b=99.0)
    clock.note()  # too early
    time.sleep(0.05)
    wall, waited = clock.seconds(threads=2)
    assert waited == pytest.approx(0.04)
    assert clock.seconds(threads=1)[1] == pytest.approx(0.03)
    assert wall >= 0.05


def test_the_report_of_a_run_says_how_long_it_waited_for_cores(
    dataset: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_TASKS", tmp_path)
    monkeypatch.setattr(timing, "READING_SECONDS", 0.0)
    monkeypatch.setattr(timing, "count_cores", lambda: 1_000_000)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("0 0 1\n")

    def wait(event: oocattn.Event) -> None:
        if isinstance(event, oocattn.Attended):
            (tmp_path / "1" / "schedstat").write_text("0 1000000000000 1\n")

    report = oocattn.attention(dataset, result, engine="inline", chunks=3, callbacks=[wait]).report
    assert report is not None
    assert report.waited > 0.8 * report.seconds
    assert "cores        others had them for " in str(report)
    assert "others had them" not in str(replace(report, waited=0.0))
    monkeypatch.setattr(report_module, "name_process", lambda: "elsewhere 1")  # the workers are other processes
    again = oocattn.attention(dataset, result, engine="inline", chunks=3, callbacks=[wait], overwrite=True).report
    assert again is not None
    assert again.waited == 0.0


def test_work_is_not_faster_than_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TASKS", tmp_path)
    monkeypatch.setattr(timing, "count_cores", lambda: 1)
    (tmp_path / "1").mkdir()
    busy: list[float] = []

    def work() -> None:
        began = time.thread_time()
        sum(range(300_000))
        busy.append(time.thread_time() - began)
        (tmp_path / "1" / "schedstat").write_text("0 1000000000000 1\n")  # a thousand seconds

    assert timing.undisturbed_seconds(work) >= 0.9 * busy[0]


def test_a_kernel_is_timed_on_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOMENT, "cpu", 0.001)
    monkeypatch.setattr(kernel_rates, "get_kernel", lambda name: SimpleNamespace(attend=lambda *_: time.sleep(0.005)))
    measured_rate.cache_clear()
    try:
        rate = kernel_rate("cpu", Sample(8, 8, "float32"), 16, 16)
    finally:
        measured_rate.cache_clear()  # that of no kernel
    assert rate > 2 * 2 * 16 * 16 * 16 / 0.005 * kernel_rates.torch.get_num_threads()


class PretendedGpu:
    """A GPU that does what was launched in order, while others are: a launch takes `launch` seconds.

    A call takes `first` seconds, and `settled` from the third of a second on; `more` where its rows are new.
    """

    def __init__(self, launch: float, first: float, settled: float, more: float = 0.0) -> None:
        self.launch, self.first, self.settled, self.more = launch, first, settled, more
        self.now = self.done = 0.0
        self.new = True

    def reset(self) -> None:
        self.new = True

    def attend(self, *_: object) -> None:
        self.now += self.launch
        begins = max(self.now, self.done)
        self.done = begins + (self.first if begins < 1 / 3 else self.settled) + self.new * self.more
        self.new = False

    def event(self, enable_timing: bool) -> PretendedEvent:
        return PretendedEvent(self)


class PretendedEvent:
    """An event behind all that was launched before."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.seconds = gpu, 0.0

    def record(self) -> None:
        self.seconds = max(self.gpu.now, self.gpu.done)

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.seconds)

    def elapsed_time(self, later: PretendedEvent) -> float:
        return (later.seconds - self.seconds) * 1e3


def seconds_found(monkeypatch: pytest.MonkeyPatch, gpu: PretendedGpu, settled: bool, row_calls: int = 0) -> float:
    """How long a call takes on a GPU, as it is timed."""
    at_once = SimpleNamespace(submit=lambda work, *given: SimpleNamespace(result=lambda: work(*given)))
    monkeypatch.setattr(kernel_rates, "launcher", lambda _: at_once)
    monkeypatch.setattr(kernel_rates, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    monkeypatch.setattr(kernel_rates, "get_kernel", lambda _: gpu)
    monkeypatch.setattr(kernel_rates.torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(kernel_rates.torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(Sample, "operands", lambda *_: None)
    monkeypatch.setattr(kernel_rates.AttentionState, "empty", lambda *_: gpu)
    sample = Sample(8, 8, "float32", row_calls=row_calls)
    return 2 * 16 * 16 * 16 / measured_rate.__wrapped__("any", sample, 16, 16, kernel_rates.torch.device("cuda"), 1, settled)


@pytest.mark.parametrize(
    ("launch", "first", "settled", "found", "settled_found"),
    [(0.002, 0.005, 0.005, 0.005, 0.005), (0.0001, 0.001, 0.0012, 0.001, 0.0012), (0.01, 0.3, 0.3, 0.3, 0.3)],
    ids=["a launch does not count", "the clock falls", "long calls"],
)
def test_a_kernel_is_timed_on_a_gpu_that_never_waits(
    monkeypatch: pytest.MonkeyPatch, launch: float, first: float, settled: float, found: float, settled_found: float
) -> None:
    for clock, expected in ((False, found), (True, settled_found)):
        gpu = PretendedGpu(launch, first, settled)
        assert seconds_found(monkeypatch, gpu, clock) == pytest.approx(expected)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize(("row_calls", "found"), [(0, 0.002), (1, 0.005), (4, 0.00275), (50, 0.00206)])
def test_first_keys_of_rows_that_take_longer_count_as_often_as_in_a_run(
    monkeypatch: pytest.MonkeyPatch, settled: bool, row_calls: int, found: float
) -> None:
    gpu = PretendedGpu(0.0001, 0.002, 0.002, more=0.003)
    assert seconds_found(monkeypatch, gpu, settled, row_calls) == pytest.approx(found)


def test_rows_of_a_survey_begin_as_often_as_a_problem_says() -> None:
    survey = SecondPass(reduced=(Reduced("top_keys", (8,), 16),))
    for keys, causal, calls in ((1 << 20, True, 8), (1 << 20, False, 16), (1 << 10, False, 1), (1 << 30, True, 0)):
        problem = replace(a_problem(keys, causal=causal), second_pass=survey)
        assert Sample.of(problem).with_row_calls(problem, 1 << 16).row_calls == calls
    proof = replace(a_problem(1 << 20), second_pass=SecondPass(seed=0))
    for problem in (a_problem(1 << 20), proof):
        assert Sample.of(problem).with_row_calls(problem, 1 << 16).row_calls == 0


def test_rates_that_differ_a_little_change_seconds_and_not_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(300))
    plans = []
    for share in (0.8, 1.2):
        monkeypatch.setattr(measure, "kernel_rate", lambda *_, share=share, **__: share * 2.0**37)
        monkeypatch.setattr(measure, "sample_rate", lambda *_, share=share: Rate(share * 2.0**30, from_disk=True))
        plans.append(oocattn.plan(dataset))
    assert plans[0].digest == plans[1].digest
    assert [plan.machine.read_rate for plan in plans] == [0.8 * 2.0**30, 1.2 * 2.0**30]
    assert plans[0].seconds > plans[1].seconds


@pytest.mark.parametrize(
    "asked",
    [{}, {"causal": True}, {"causal": True, "window_size": (4095, 0)}, {"queries": slice(1 << 19, (1 << 19) + 1024)}],
)
@pytest.mark.parametrize(
    ("kernel", "dim", "most"), [("hopper", 64, 1 << 18), ("hopper", 32, 1 << 19), ("cudnn", 8, 1 << 16)]
)
def test_a_gpu_is_given_as_many_keys_a_call_as_its_kernel_chains(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], kernel: str, dim: int, most: int
) -> None:
    monkeypatch.setattr(measure, "_choose_kernel", lambda *_: ("cuda", kernel))
    monkeypatch.setattr(measure, "_gpu_rate", lambda *_: (1e14, 0))
    monkeypatch.setattr(measure, "count_lanes", lambda _: 1)
    tensors = {name: np.zeros((1, 1, 1 << 20, dim), np.float16) for name in "qkv"}
    plan = oocattn.plan(tensors, device_memory="4GiB", **asked)
    assert most / 2 < plan.tiles.key <= most


def test_a_rate_is_of_as_many_threads_as_there_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    before, sample = kernel_rates.torch.get_num_threads(), Sample(8, 8, "float32")
    monkeypatch.setattr(kernel_rates, "_time_calls", lambda *_: [1.0])
    measured_rate.cache_clear()
    try:
        kernel_rates.torch.set_num_threads(1)
        alone = kernel_rate("cpu", sample, 32, 32)
        kernel_rates.torch.set_num_threads(8)
        together = kernel_rate("cpu", sample, 32, 32)
    finally:
        kernel_rates.torch.set_num_threads(before)
        measured_rate.cache_clear()  # that of no kernel
    assert together == 8 * alone
