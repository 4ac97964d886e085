"""As a run ends before its time: what executes is waited for, whichever engine runs it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from distributed import Client
from support import carry_out, plan_for, run_of

import oocattn
from oocattn import Event
from oocattn.pipelines.engines import base, inline
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import Attended


def test_what_is_left_behind_is_said_in_the_words_of_the_run(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended, attend = threading.Event(), Lane.attend

    def attend_too_long(lane: Lane, turn: int) -> Attended | None:
        ended.wait(30)
        return attend(lane, turn)

    monkeypatch.setattr(Lane, "attend", attend_too_long)
    loggers = [logging.getLogger(name) for name in ("distributed.worker", "distributed.worker.state_machine")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        with pytest.raises(oocattn.TimeLimitError, match="0 of 3 subproblems are done"):
            oocattn.attention(dataset, result, chunks=3, decomposition="cqs", time_limit=4)
    finally:
        ended.set()
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert base.NOT_STOPPED in caplog.messages
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("distributed")]


@pytest.mark.parametrize("engine", ["dask", "inline"])
def test_a_run_that_is_stopped_saves_after_what_executes_has_ended(
    engine: str, client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    executing = threading.Event()
    attend, save = Lane.attend, Lane.save

    def attend_slowly(lane: Lane, turn: int) -> Attended | None:
        steps.append("begin")
        executing.set()
        time.sleep(0.3)
        event = attend(lane, turn)
        steps.append("end")
        return event

    def note_save(lane: Lane) -> int:
        steps.append("save")
        return save(lane)

    def stop(event: Event) -> None:
        if event.kind == "staged" and executing.wait(10):
            raise KeyboardInterrupt

    monkeypatch.setattr(Lane, "attend", attend_slowly)
    monkeypatch.setattr(Lane, "save", note_save)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan_for(dataset, chunks=3), dataset, result, client if engine == "dask" else "inline", [stop])
    tasks, last = steps[:-1], steps[-1]
    assert last == "save"
    assert tasks == ["begin", "end"] * tasks.count("begin")  # more than one on a busy machine


def test_an_inline_lane_that_is_made_when_its_run_has_ended_is_closed(
    dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, ended = threading.Event(), threading.Event()
    closed: list[str] = []

    class SlowLane(Lane):
        def __init__(self, run: Run, device: str) -> None:
            making.set()
            assert ended.wait(10)
            super().__init__(run, device)

        def close(self) -> None:
            super().close()
            closed.append("closed")

    monkeypatch.setattr(inline, "Lane", SlowLane)
    plan = plan_for(dataset, chunks=3)
    lanes = inline.InlineLanes(run_of(fast_path, plan), ["cpu"])
    opened = lanes.open()
    assert making.wait(10)
    lanes.stop(1.0)
    lanes.close(1.0)
    ended.set()
    opened.result(10)
    assert closed == ["closed"]
