"""The first signal is held back until the run has ended, wherever it comes from; the second one is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
from distributed import Client
from interrupting import uninterrupted
from support import Recorder, assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, TimeLimitError
from oocattn.pipelines.signals import SIGNALS, InterruptedRunError, Interrupts


def under_a_run(*steps: Callable[[Interrupts], object]) -> None:
    """Do these steps while signals are held back."""
    with Interrupts() as interrupts:
        for step in steps:
            step(interrupts)


def send(number: int) -> Callable[[Interrupts], None]:
    return lambda _: os.kill(os.getpid(), number)


interrupt = send(signal.SIGINT)


def raising(error: BaseException) -> Callable[[Interrupts], None]:
    def step(_: Interrupts) -> None:
        raise error

    return step


def test_a_signal_is_told_and_delivered_at_the_end() -> None:
    told: list[tuple[bool, int]] = []

    def listen(interrupts: Interrupts) -> None:
        interrupts.tell = lambda: told.append((interrupts.asked, Interrupts.held))

    with pytest.raises(KeyboardInterrupt):
        under_a_run(listen, interrupt, lambda _: told.append((False, -1)))
    assert told == [(True, 1), (False, -1)]
    assert Interrupts.held == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_is_not_held_back() -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        under_a_run(interrupt, lambda _: steps.append("first"), interrupt, lambda _: steps.append("second"))
    assert steps == ["first"]
    assert Interrupts.held == 0


def test_an_error_comes_before_a_signal_that_is_held_back() -> None:
    with pytest.raises(OSError, match="disk"):
        under_a_run(interrupt, raising(OSError("disk")))


def test_a_driver_that_stops_is_always_interrupted() -> None:
    """Also where the signal's handler only returns."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            under_a_run(interrupt, raising(InterruptedRunError()))
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupts.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigusr1_ends_a_run_as_a_time_limit_does() -> None:
    """Also a second one, and after a handler that was there before."""
    seen: list[int] = []
    with pytest.raises(TimeLimitError, match="SIGUSR1"):
        under_a_run(send(signal.SIGUSR1), send(signal.SIGUSR1), raising(InterruptedRunError()))
    under_a_run(send(signal.SIGUSR1))  # a run that was finished all the same
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with pytest.raises(TimeLimitError):
            under_a_run(send(signal.SIGUSR1), raising(InterruptedRunError()))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_an_interrupt_after_sigusr1_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt):
        under_a_run(send(signal.SIGUSR1), interrupt, raising(OSError("not reached")))


def test_a_process_that_hangs_up_is_killed_when_its_run_has_saved() -> None:
    script = (
        "import os, signal\nfrom oocattn.pipelines.signals import Interrupts\n"
        "with Interrupts():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('saved', flush=True)\nprint('no')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGHUP, "saved\n")


@pytest.mark.parametrize(
    ("moment", "partials"),
    [("started", "memory"), ("staged", "disk"), ("attended", "memory"), ("attended", "disk"), ("written", "memory")],
)
def test_an_interrupted_run_leaves_what_was_in_flight_on_disk(
    client: Client, fast_path: Path, partials: str, moment: str
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))
    result = fast_path / "result.zarr"
    plan = plan_for(dataset, chunks=7, causal=True, partials=partials)
    right = uninterrupted(plan, dataset)
    recorder, seen = Recorder([]), []

    def at_the_moment(event: Event) -> None:
        if event.kind == moment and not seen:
            seen.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, dataset, result, client, callbacks=[recorder, at_the_moment])
    assert recorder.events[-1].kind == "failed"
    assert "what was in flight is on disk" in str(recorder.events[-1].error)
    assert oocattn.status(result).state == "interrupted"
    again = Recorder([])
    assert_same_bits(oocattn.resume(result, client=client, callbacks=[again]), right)
    if partials == "disk":  # of what had been attended nothing is attended again
        assert len(again.of("attended")) <= plan.subproblems - len(recorder.of("attended"))


def test_signals_end_a_fork_of_a_process_with_a_run() -> None:
    with Interrupts():
        process = os.fork()
        if process == 0:
            for number in SIGNALS:
                if isinstance(signal.getsignal(number), MethodType):
                    os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert isinstance(signal.getsignal(signal.SIGTERM), MethodType)
