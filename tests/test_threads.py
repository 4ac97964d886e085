"""Threads of our own: they do what Python's pools do, and one that hangs keeps no interpreter from its exit."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import normal_arrays, write_dataset

import oocattn
from oocattn import threads
from oocattn.threads import ThreadPool, begin_call, map_in_order

SOON = 30.0
"""Seconds in which all here ends, also on a busy machine."""

HANGING_POOL = """
import threading
from oocattn import threads
from oocattn.threads import ThreadPool, begin_call
threads.EXIT_SECONDS = 0.5
pool = ThreadPool(2, "hanging")
pool.submit(threading.Event().wait)
begin_call(threading.Event().wait)
print("ended", flush=True)
"""

HANGING_READS = """
import os, signal, sys, threading, time
import oocattn
from oocattn import threads
from oocattn.storage.inputs.zarr_source import ZarrSource

threads.EXIT_SECONDS = 0.5

def interrupt_twice():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

class HangReads:
    begun = False

    def __call__(self, event):
        if isinstance(event, oocattn.Started):
            ZarrSource.read_rows = self.hang

    def hang(self, *_):
        if not HangReads.begun:
            HangReads.begun = True
            threading.Thread(target=interrupt_twice, daemon=True).start()
        threading.Event().wait()

try:
    oocattn.attention(*sys.argv[1:3], engine=sys.argv[3], callbacks=[HangReads()])
except KeyboardInterrupt:
    print("ended", flush=True)
"""


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event for threads to hang on until the test has ended."""
    event = threading.Event()
    yield event
    event.set()


def seconds_to_exit(script: str, *arguments: str) -> float:
    """Seconds from the end of a script, which prints "ended", to the end of its process."""
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        killing = threading.Timer(3 * SOON, process.kill)
        killing.start()
        try:
            assert process.stdout.readline() == "ended\n"
            start = time.monotonic()
            assert process.wait() == 0
            return time.monotonic() - start
        finally:
            killing.cancel()


def test_an_interpreter_whose_threads_hang_exits() -> None:
    assert seconds_to_exit(HANGING_POOL) < SOON


def test_an_interpreter_exits_after_a_run_whose_reads_hang_was_interrupted_twice(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data.zarr", normal_arrays(64))
    assert seconds_to_exit(HANGING_READS, str(dataset), str(tmp_path / "out.zarr"), "dask") < SOON


def test_no_module_makes_threads_that_python_joins_at_exit() -> None:
    found = []
    for path in sorted(Path(oocattn.__file__).parent.rglob("*.py")):
        text = path.read_text()
        found += [f"{path}: {name}" for name in ("ThreadPoolExecutor", "to_thread", "run_in_executor") if name in text]
        found += [f"{path}: {call}" for call in re.findall(r"threading\.Thread\(.*\)", text) if "daemon=True" not in call]
    assert not found


def test_a_pool_gives_results_in_order_and_raises_what_calls_raise() -> None:
    with ThreadPool(3, "testing") as pool:
        assert list(pool.map(lambda number: number * 2, range(100))) == list(range(0, 200, 2))
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 // 0).result()
    with pytest.raises(RuntimeError, match="the threads testing have ended"):
        pool.submit(int)


def test_a_pool_has_no_more_threads_than_asked_and_prepares_each() -> None:
    prepared: list[str] = []
    with ThreadPool(2, "testing", lambda: prepared.append(threading.current_thread().name)) as pool:
        names = set(pool.map(lambda _: (time.sleep(0.001), threading.current_thread().name)[1], range(50)))
    assert names <= {"testing-0", "testing-1"}
    assert names == set(prepared)
    assert len(prepared) == len(names)


def test_what_cannot_be_prepared_fails_the_call() -> None:
    with ThreadPool(1, "testing", lambda: 1 // 0) as pool, pytest.raises(ZeroDivisionError):
        pool.submit(int).result(SOON)


def test_a_pool_that_is_dropped_leaves_no_thread() -> None:
    pool = ThreadPool(2, "testing-dropped")
    pool.submit(int).result()
    pool.submit(int).result()
    left = list(pool._threads)
    del pool
    gc.collect()
    for thread in left:
        thread.join(SOON)
        assert not thread.is_alive()


def test_a_pool_whose_body_fails_cancels_what_waits_and_does_not_wait_for_what_hangs(
    monkeypatch: pytest.MonkeyPatch, never: threading.Event
) -> None:
    monkeypatch.setattr(threads, "EXIT_SECONDS", 0.05)
    begun = threading.Event()
    with suppress(KeyboardInterrupt), ThreadPool(1, "testing") as pool:
        hanging = pool.submit(lambda: begun.set() or never.wait())
        waiting = pool.submit(int)
        begun.wait(SOON)
        raise KeyboardInterrupt
    assert waiting.cancelled()
    assert hanging.running()


def test_results_come_in_the_order_of_the_calls_and_few_are_begun_ahead() -> None:
    made: list[int] = []

    def call(number: int, seconds: float) -> int:
        time.sleep(seconds)
        return number

    def calls() -> Iterator[tuple[int, float]]:
        for number in range(20):
            made.append(number)
            yield number, 0.02 if number % 4 == 0 else 0.0

    with ThreadPool(4, "testing") as pool:
        for number, result in enumerate(map_in_order(pool, call, calls(), 5)):
            assert result == number
            assert len(made) <= number + 6
    assert len(made) == 20


def test_the_first_call_that_fails_ends_the_others() -> None:
    with pytest.raises(ZeroDivisionError), ThreadPool(2, "testing") as pool:
        list(map_in_order(pool, divmod, ((1, 5 - number) for number in range(1000)), 3))


def test_a_call_in_a_thread_of_its_own_cannot_be_cancelled(never: threading.Event) -> None:
    called = begin_call(never.wait)
    assert not called.cancel()
    never.set()
    assert called.result(SOON)
