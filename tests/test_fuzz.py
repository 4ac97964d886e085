"""Whatever bytes lie in a run's files or in a dataset, a command does its work, or ends soon with one line that says why."""

from __future__ import annotations

import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import pytest
from forking import Commands
from fuzzing import LIMIT_SECONDS, Case, Outcome, complaints, make_case, unwatch, watch
from worlds import World, make_world

from oocattn.cli.main import main
from oocattn.pipelines.engines.dask import engine as dask_engine
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.storage.journal import lock


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield make_world(Path(folder))


class TooLongError(BaseException):
    """A command has taken as long as it may."""


def end_command(number: int, frame: FrameType | None) -> None:
    raise TooLongError


@contextmanager
def limited() -> Iterator[None]:
    """What lasts longer than a command may raises TooLongError."""
    before = signal.signal(signal.SIGALRM, end_command)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_here(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Run a command in this process."""
    events: list[str] = []
    capsys.readouterr()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        watch(events)
        try:
            with limited():
                code = main(list(command))
        except Exception as error:
            events.append(f"raised {error!r:.200}")
            code = -1
        except TooLongError:
            code = -1
        finally:
            unwatch()
    said = capsys.readouterr()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    events += [f"lets a warning through: {each.message}" for each in warned if "oocattn" not in each.filename]
    return Outcome(code, time.monotonic() - start, said.out, said.err, tuple(events), grown)


def check(world: World, case: Case, outcome: Outcome) -> list[str]:
    """What does not hold of a command, with what it said; afterwards everything is as it was before the case."""
    found = complaints(world, case, outcome)
    world.restore(*case.damaged)
    return [f"{case}: {'; '.join(found)}\n{outcome.err[-1500:]}"] if found else []


def test_a_hundred_damaged_files(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(dask_engine, "local_engine", lambda *_: nullcontext(InlineEngine(1)))
    failures: list[str] = []
    for seed in range(100):
        case = make_case(world, seed)
        failures += check(world, case, run_here(case.command, capsys))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1000, 1500, 2000, 2500])
def test_two_thousand_damaged_files_met_by_processes(world: World, first: int) -> None:
    failures: list[str] = []
    with Commands() as commands:
        for seed in range(first, first + 500):
            case = make_case(world, seed)
            failures += check(world, case, commands.run(case.command))
    assert not failures, "\n".join(failures)
