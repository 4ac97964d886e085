"""A run ends before its time limit with what it did on disk, and goes on from there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from interrupting import uninterrupted
from support import (
    Recorder,
    assert_nothing_written,
    assert_same_bits,
    make_event,
    normal_arrays,
    plan_for,
    write_dataset,
)

import oocattn
from oocattn import Event, ProblemError, TimeLimitError, clock
from oocattn.pipelines import deadline as deadline_module
from oocattn.pipelines.deadline import MARGIN_SECONDS, Deadline
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.pipelines.existing import Request
from oocattn.pipelines.session import run_plan
from oocattn.pipelines.watch.events import Span
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_run_that_is_out_of_time_can_be_resumed_again_and_again(
    dataset: Path, result: Path, partials: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True, partials=partials)
    right = uninterrupted(plan, dataset)
    paths, done, runs = ResultPaths.at(result), 0, 0
    for _ in range(40):
        moment = [0.0]  # of which a minute passes with every subproblem
        recorder = Recorder([])

        def tick(event: Event, moment: list[float] = moment) -> None:
            moment[0] += 60.0 * (event.kind == "attended")

        with monkeypatch.context() as patched:
            patched.setattr(deadline_module, "clock", SimpleNamespace(now=lambda moment=moment: moment[0]))
            patched.setattr(Deadline, "learn", lambda *_: None)
            try:
                request = Request(plan.problem, Dataset.open(dataset), paths)
                found = run_plan(plan, request, InlineEngine(1), callbacks=[recorder, tick], until=80.0)
                break
            except TimeLimitError:
                pass
        runs += 1
        done += len(recorder.of("attended"))
        status = oocattn.status(result)
        assert status.state == "interrupted"
        assert status.subproblems_done >= done
        assert status.tokens_done == int(170 * status.pairs_done / status.pairs)
        assert "it ended: time limit reached: " in str(status)
    assert runs > 3
    assert_same_bits(found, right)


def test_time_for_what_is_in_flight_is_kept(dataset: Path) -> None:
    plan = replace(plan_for(dataset, chunks=7, partials="memory"), scratch_disk=3_000_000_000)
    assert Deadline(math.inf, plan).seconds_left == math.inf
    deadline = Deadline(clock.now() + 100, plan)
    assert deadline.seconds_left == pytest.approx(100 - MARGIN_SECONDS - 3 - 2 * plan.subproblem_seconds, abs=0.5)
    for seconds in (7.0, 4.0):
        deadline.learn(make_event("attended", 10.0, 10.0 + seconds))
        assert deadline.seconds_left == pytest.approx(
            100 - MARGIN_SECONDS - 3 - 2 * 7, abs=0.5
        )  # a second one waits behind the first
    deadline.learn(make_event("attended", 0.0, 0.0, spans=(Span("save", 20.0, 31.0),)))
    assert deadline.seconds_left == pytest.approx(100 - MARGIN_SECONDS - 11 - 2 * 7, abs=0.5)
    on_gpu = Deadline(clock.now() + 100, replace(plan, machine=replace(plan.machine, device="cuda")))
    on_gpu.learn(make_event("attended", 10.0, 17.0))
    assert on_gpu.seconds_left == pytest.approx(100 - MARGIN_SECONDS - 3 - 7, abs=0.5)


def test_a_run_stalls_after_three_minutes_or_where_the_plan_predicts_longer_steps_later(dataset: Path) -> None:
    short = plan_for(dataset, chunks=7, partials="memory")
    deadline = Deadline(math.inf, short)
    assert (deadline.noticed_seconds, deadline.stalled_seconds) == (30, 180)
    for seconds in (0.1, 0.2, 170.0):  # the last was stopped for a while
        deadline.learn(make_event("attended", 10.0, 10.0 + seconds))
    assert (deadline.noticed_seconds, deadline.stalled_seconds) == (30, 180)
    for _ in range(3):
        deadline.learn(make_event("staged", 10.0, 70.0))
    assert (deadline.noticed_seconds, deadline.stalled_seconds) == (240, 600)
    link = replace(short.links[0], seconds=100.0 * min(short.subproblems, short.chunks * short.problem.head_groups))
    slow_reading = replace(short, links=(link, *short.links[1:]))
    assert Deadline(math.inf, slow_reading).stalled_seconds == pytest.approx(1000)


def test_a_limit_that_has_passed_computes_nothing(dataset: Path, result: Path) -> None:
    words = r"time limit reached: 0 of \d+ subproblems are done, .*, none of them since the start: one takes .*allow .* and "
    with pytest.raises(TimeLimitError, match=words):
        oocattn.attention(dataset, result, engine="inline", time_limit=0)
    assert oocattn.status(result).subproblems_done == 0
    assert oocattn.resume(result, engine="inline", time_limit="1h").path == result


def test_what_is_no_duration_is_refused_before_anything_is_done(dataset: Path, result: Path) -> None:
    for options in ({"time_limit": "soon"}, {"checkpoint_interval": -1}, {"time_limit": math.nan}):
        with pytest.raises(ProblemError, match=r"interval|limit"):
            oocattn.attention(dataset, result, engine="inline", **options)
    assert_nothing_written(result)
