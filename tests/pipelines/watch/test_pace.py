"""The one estimate of the time left: what it says early, after a resume, of uneven work, while stalled, and everywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import make_event, normal_arrays, plan_for, write_dataset

from oocattn import clock
from oocattn.pipelines.watch.board import Board
from oocattn.pipelines.watch.events import Event
from oocattn.pipelines.watch.pace import Estimate, Pace
from oocattn.pipelines.watch.progress import ProgressBar
from oocattn.pipelines.watch.status_file import StatusFile
from oocattn.pipelines.watch.status_record import Status
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths

RECORDED: dict[str, list[list[Any]]] = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())
"""Runs on two cores that others used as well: kind of event, seconds since the start, pairs."""


def event(kind: Any, at: float, **given: Any) -> Event:
    return make_event(kind, at, at, **given)


def pace(seconds: float, pairs: int, *, of: int = 0, subproblems: int = 10, left: int = 10) -> Pace:
    """Of a run with so many pairs left, for which `seconds` are planned as a whole."""
    problem = SimpleNamespace(out_rows=1000, batch=1, pairs=of or pairs)
    plan = SimpleNamespace(subproblems=subproblems, seconds=seconds, problem=problem)
    made = event("started", 0, plan=plan, left=left, pairs_left=pairs)
    return Pace(made)  # type: ignore[arg-type]


def after(made: Pace, *events: Event) -> Pace:
    for each in events:
        made(each)
    return made


def test_before_anything_is_done_the_plan_is_believed() -> None:
    made = pace(100.0, 1000)
    assert made.at(0).seconds_left == 100
    assert made.at(4).seconds_left == 96
    after(made, event("staged", 4))
    assert made.at(5).seconds_left == 99  # the first chunks are read: now the work begins


def test_what_was_measured_soon_counts_more_than_the_plan() -> None:
    made = after(pace(1000.0, 1000), event("staged", 0), *(event("attended", n, pairs=100) for n in (1, 2)))
    assert made.at(2).seconds_left == pytest.approx(800 * (2 + 0.05 * 1000) / (200 + 0.05 * 1000))
    after(made, *(event("attended", n, pairs=100) for n in range(3, 10)))
    assert made.at(9).seconds_left < 8


def test_a_resumed_run_has_the_rate_of_this_process() -> None:
    made = pace(100.0, 100, of=1000, left=1)
    assert made.at(0).predicted_seconds == made.at(0).seconds_left == 10
    after(made, event("staged", 0), event("progressed", 5, worker="a", pairs=50))
    found = made.at(5)
    assert found.seconds_left == pytest.approx(5)
    assert (found.share, found.pairs_done, found.in_flight) == (0.95, 950, 50)
    assert found.rate == 10  # 50 tokens


def test_uneven_subproblems_count_by_their_pairs() -> None:
    made = after(pace(100.0, 1000, subproblems=2, left=2), event("staged", 0), event("attended", 90, pairs=900))
    assert made.at(90).seconds_left == pytest.approx(10)
    assert made.at(90).share == 0.9


def test_tiles_move_a_run_of_one_subproblem() -> None:
    made = after(pace(10.0, 1000, subproblems=1, left=1), event("staged", 0))
    shares, left = [], []
    for second in range(1, 11):
        after(made, event("progressed", 10 * second, worker="a", pairs=100 * second))
        shares.append(made.at(10 * second).share)
        left.append(made.at(10 * second).seconds_left)
    assert shares == [second / 10 for second in range(1, 11)]
    assert left[1:] == sorted(left[1:], reverse=True)
    assert left[4] == pytest.approx(50, rel=0.1)
    after(made, event("attended", 101, worker="a", pairs=1000))
    assert made.at(101).share == 1
    assert made.at(101).in_flight == 0


def test_time_in_which_the_run_stalls_is_not_work() -> None:
    made = after(pace(100.0, 1000), event("staged", 0), event("attended", 10, pairs=100))
    before = made.at(15)
    stalled = make_event("stalled", 15, 45, reason="no worker")
    after(made, stalled)
    for now in (45, 100, 1000):
        assert made.at(now).seconds_left == before.seconds_left
    after(made, event("stalled", 1010, reason=""))
    assert made.at(1010).seconds_left == before.seconds_left
    after(made, event("attended", 1020, pairs=100))
    assert made.at(1020).seconds_left == pytest.approx(800 * (25 + 5) / (200 + 50))
    assert made.at(1020).rate == pytest.approx(200 / 25)


def test_a_step_that_does_not_end_makes_the_time_left_longer() -> None:
    made = after(pace(100.0, 1000), event("staged", 0), event("attended", 10, pairs=100))
    found = [made.at(now).seconds_left for now in range(10, 200)]
    assert found[:11] == pytest.approx(range(90, 79, -1))
    assert found[11:] == sorted(found[11:])
    assert max(abs(first - second) for first, second in pairwise(found)) < 6


def test_what_is_lost_is_left_again() -> None:
    made = after(pace(100.0, 1000), event("staged", 0), event("attended", 10, pairs=100))
    after(made, event("progressed", 15, worker="a", pairs=50), event("recovered", 20, left=10, pairs_left=1000))
    assert made.at(20).share == 0
    after(made, event("attended", 30, pairs=100))
    assert made.at(30).share == 0.1
    assert made.at(30).seconds_left == pytest.approx(900 * (30 + 5) / (200 + 50))


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_run_without_work_has_an_estimate(pairs: int) -> None:
    made = pace(0.0, pairs, subproblems=pairs, left=pairs)
    assert made.at(0).seconds_left == 0
    after(made, event("ended", 3))
    assert (made.at(9).seconds, made.at(9).seconds_left) == (3, 0)


def replay(run: Sequence[Sequence[Any]], share: float) -> Estimate:
    """What was said of a recorded run when such a share of its time had passed."""
    _, _, pairs, left, seconds, subproblems, of = run[0]
    made, moment = pace(seconds, pairs, of=of, subproblems=subproblems, left=left), share * run[-1][1]
    for kind, at, *counted in run[1:]:
        if at <= moment:
            of_kind = {"worker": "inline-0"} if counted else {}
            made(event(kind, at, **of_kind, **({"pairs": counted[0]} if counted else {})))
    return made.at(moment)


@pytest.mark.parametrize("name", RECORDED)
def test_the_end_of_recorded_runs_was_foreseen(name: str) -> None:
    run = RECORDED[name]
    end = run[-1][1]
    errors = {share: replay(run, share).expected_seconds / end - 1 for share in (0.1, 0.25, 0.5, 0.75)}
    assert all(abs(error) < bound for error, bound in zip(errors.values(), (0.25, 0.15, 0.1, 0.2), strict=True))


def test_bar_status_log_and_page_say_the_same(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(write_dataset(fast_path / "dataset.zarr", normal_arrays(130)), chunks=7, causal=True)
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    told: list[Status] = []
    drawn: list[Estimate] = []
    with FileLock(paths.lock) as held, StatusFile(paths.status, held.claim, tell=told.append) as written:
        monkeypatch.setattr("oocattn.pipelines.watch.status_file.WRITING_SECONDS", 0.0)
        board, bar = Board("result.zarr"), ProgressBar()
        monkeypatch.setattr(ProgressBar, "_draw", lambda bar, _: drawn.append(bar._pace.at(clock.now())))
        monkeypatch.setattr(StatusFile, "_beat", lambda _: None)
        monkeypatch.setattr("oocattn.pipelines.watch.progress.DRAWING_SECONDS", 0.0)
        pairs = plan.problem.pairs
        happened = [
            event("started", 100, plan=plan, left=7, pairs_left=pairs),
            event("staged", 101),
            event("progressed", 103, worker="a", pairs=pairs // 9),
            event("attended", 105, worker="a", pairs=pairs // 7),
            make_event("stalled", 110, 150, reason="a disk"),
            event("stalled", 160),
            event("attended", 171, worker="b", pairs=pairs // 3),
        ]
        for each in happened:
            monkeypatch.setattr(clock, "now", lambda moment=each.stop + 0.5: moment)
            for listener in (written, board, bar):
                listener(each)
            if each.kind == "started":
                continue
            record, status, of_bar = board.record(), told[-1], drawn[-1]
            for name in ("seconds_left", "seconds", "share"):
                assert record[name] == getattr(status, name) == getattr(of_bar, name), each.kind
            assert record["seconds_left"] > 0
        bar(event("failed", 172))
