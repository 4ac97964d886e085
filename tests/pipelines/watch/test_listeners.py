"""A listener that fails is logged and dropped, and the run goes on; only what is no Exception ends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Recorder, carry_out, plan_for

import oocattn
from oocattn import Event, IntegrityError, WorkerLostError
from oocattn.pipelines.watch.status_file import StatusFile

ERRORS = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),  # of a log, not of the result
    BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    ZeroDivisionError("x\x1b[2J\nforged"),
    WorkerLostError("a worker is gone"),  # as if the driver had raised it
    IntegrityError("torn"),
]


def raising(error: BaseException, seen: list[Event], kind: str = "attended") -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        seen.append(event)
        if event.kind == kind:
            raise error

    return listen


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_a_listener_is_logged_once_and_the_run_goes_on(
    dataset: Path, result: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Event] = []
    recorder = Recorder([])
    found = carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[raising(error, seen), recorder])
    assert [event.kind for event in seen].count("attended") == 1
    assert len(recorder.of("attended")) == 7
    assert found.report.workers_lost == found.report.retried == 0
    (line,) = [record.getMessage() for record in caplog.records if "a listener failed" in record.getMessage()]
    assert type(error).__name__ in line
    assert "test_listeners.py, line" in line
    assert not {"\x1b", "\n"} & set(line)


@pytest.mark.parametrize("kind", ["started", "committed", "ended"])
def test_a_listener_may_fail_at_the_beginning_and_the_end_of_a_run(dataset: Path, result: Path, kind: str) -> None:
    listener = raising(RuntimeError("enough"), [], kind)
    assert carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[listener]).path == result
    assert oocattn.status(result).state == "finished"


def test_a_status_file_that_fails_does_not_end_a_run(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("a defect")

    monkeypatch.setattr(StatusFile, "_add", fail)
    assert carry_out(plan_for(dataset, chunks=7), dataset, result).path == result


def test_a_listener_ends_a_run_by_another_exception_and_it_can_be_resumed(dataset: Path, result: Path) -> None:
    recorder = Recorder([])
    listeners = [recorder, raising(SystemExit("enough"), [])]
    with pytest.raises(SystemExit, match="enough"):
        carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=listeners)
    assert recorder.events[-1].kind == "failed"
    assert oocattn.status(result).error == "SystemExit: enough"
    assert oocattn.resume(result, engine="inline").path == result
