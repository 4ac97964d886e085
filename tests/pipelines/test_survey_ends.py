"""A survey whose pass has attended all pairs still ends when it is told to, and goes on with what is missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from passes import ARRAYS, bits, copied, planned
from support import BESIDE, normal_arrays, write_dataset

import oocattn
from oocattn import Survey, TimeLimitError, clock
from oocattn.cli.main import main
from oocattn.pipelines import summing, survey_arrays
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.signals import Interrupts
from oocattn.storage.results.rows import RowReader

TOKENS = 150


@pytest.fixture(scope="module")
def first(shared_path: Path) -> Path:
    """A result without a survey; not to be changed."""
    dataset = write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=2, kv_heads=2))
    oocattn.attention(dataset, shared_path / "first.zarr", causal=True, engine="inline")
    return shared_path / "first.zarr"


@pytest.fixture(scope="module")
def right(first: Path, shared_path: Path) -> dict[str, bytes]:
    """The bits of its survey."""
    return bits(survey(copied(first, shared_path / "right.zarr")))


@pytest.fixture
def result(first: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(summing, "MOST_IN_CHUNKS", 40)  # of each head several parts
    monkeypatch.setattr(summing, "_room", lambda plan: 0)  # one at a time
    return copied(first, fast_path / "result.zarr")


def survey(result: Path, **options: Any) -> Survey:
    with planned(3):
        return oocattn.survey(result, **{"engine": "inline", "pool": 7, **options})


def send(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def happens(_: pytest.MonkeyPatch) -> None:
        before = Interrupts.held
        os.kill(os.getpid(), number)
        while Interrupts.held == before:  # the main thread takes it
            time.sleep(0.001)

    return happens


def pass_an_hour(patch: pytest.MonkeyPatch) -> None:
    real = clock.now
    patch.setattr(clock, "now", lambda: real() + 3600)


def at_read(patch: pytest.MonkeyPatch, count: int, happens: Callable[[pytest.MonkeyPatch], None]) -> list[object]:
    """Have something happen as the `count`-th sums of a block are read; all that are read."""
    real, read = PartialFiles.read_sums, list[object]()

    def spy(files: PartialFiles, *asked: Any) -> None:
        read.append(asked[0])
        if len(read) == count:
            happens(patch)
        real(files, *asked)

    patch.setattr(PartialFiles, "read_sums", spy)
    return read


def check_settled(result: Path) -> None:
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse", *ARRAYS}
    assert {path.name for path in result.with_name("result.zarr.oocattn").iterdir()} == BESIDE


ENDS = {
    "a time limit": (pass_an_hour, TimeLimitError),
    "Ctrl-C": (send(signal.SIGINT), KeyboardInterrupt),
    "SIGUSR1": (send(signal.SIGUSR1), TimeLimitError),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("count", [1, 12])
def test_sums_that_are_being_added_up_are_left_and_go_on(
    count: int, end: str, result: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    happens, error = ENDS[end]
    with monkeypatch.context() as patch:
        read = at_read(patch, count, happens)
        with pytest.raises(error):
            survey(result, time_limit=3600)
    assert len(read) == count, "the next block is not read"
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse"}
    status = oocattn.status(f"{result}.oocattn/survey.zarr")
    assert (status.state, status.share) == ("interrupted", 1.0)
    begun: list[oocattn.Event] = []
    with monkeypatch.context() as patch:
        again = at_read(patch, 0, pass_an_hour)
        assert bits(survey(result, callbacks=[begun.append])) == right
    assert [event.kind for event in begun] == ["started", "committed", "ended"], "no pair is attended again"
    check_settled(result)
    with monkeypatch.context() as patch:
        whole = at_read(patch, 0, pass_an_hour)
        survey(result, overwrite=True)
    assert (len(again) < len(whole)) == (count > 1), "what was written stays"


CODES = {"a time limit": (pass_an_hour, 75), "Ctrl-C": (send(signal.SIGINT), 130), "SIGTERM": (send(signal.SIGTERM), 143)}


@pytest.mark.parametrize("end", CODES)
def test_the_command_ends_with_the_code_of_what_ended_it(
    end: str,
    result: Path,
    right: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    happens, code = CODES[end]
    given = ["survey", str(result), "--pool", "7", "--engine", "inline", "--no-progress"]
    with monkeypatch.context() as patch, planned(3):
        read = at_read(patch, 3, happens)
        assert main([*given, "--time-limit", "1h"]) == code
    assert len(read) == 3, "the next block is not read"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; what is done is kept: give the same command again")
    with planned(3):
        assert main(given) == 0
    assert bits(survey(result)) == right
    check_settled(result)


def test_a_time_limit_ends_the_making_of_arrays_and_the_pass_is_kept(
    result: Path, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    class Reader(RowReader):
        def read(self, *asked: Any) -> None:
            read.append(asked)
            if len(read) == 5:
                pass_an_hour(patch)
            super().read(*asked)

    with monkeypatch.context() as patch:
        patch.setattr(survey_arrays, "RowReader", Reader)
        with pytest.raises(TimeLimitError, match="while the arrays of the survey were made: its pass is done and kept"):
            survey(result, time_limit=3600)
    assert len(read) == 6, "of a chunk both `out` and `lse` are read"
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse"}
    begun: list[oocattn.Event] = []
    assert bits(survey(result, callbacks=[begun.append])) == right
    assert not begun, "its pass was done"
    check_settled(result)
