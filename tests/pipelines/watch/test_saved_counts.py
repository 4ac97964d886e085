"""However a run ends, all who watch it count the subproblems that are on disk, as the next process finds them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from distributed import Client
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event
from oocattn.pipelines.watch import status_file
from oocattn.pipelines.watch.board import Board
from oocattn.pipelines.watch.events import Started
from oocattn.pipelines.watch.pace import Pace


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


class Watching:
    """A listener that keeps the pace of a run."""

    pace: Pace

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.pace = Pace(event)
        else:
            self.pace(event)


def once_at(kind: str, count: int, act: Callable[[], object]) -> Callable[[Event], None]:
    """A listener that acts at the `count`-th event of a kind."""
    seen: list[Event] = []

    def listen(event: Event) -> None:
        if event.kind == kind:
            seen.append(event)
            if len(seen) == count:
                act()

    return listen


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise SystemExit("enough")


@pytest.mark.parametrize("engine", ["inline", "dask"])
@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("end", [interrupt, fail])
def test_all_count_what_is_on_disk(
    client: Client, dataset: Path, fast_path: Path, engine: str, partials: str, end: Callable[[], None]
) -> None:
    plan = plan_for(dataset, chunks=13, causal=True, partials=partials)
    where: Client | Literal["inline"] = client if engine == "dask" else "inline"
    for kind, count in (("started", 1), ("staged", 3), ("attended", 1), ("attended", 14), ("written", 2)):
        result = fast_path / f"{kind}-{count}.zarr"
        board, watching = Board(str(result)), Watching()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            carry_out(plan, dataset, result, where, callbacks=[board, watching, once_at(kind, count, end)])
        status, report, shown = oocattn.status(result), oocattn.report(result), board.record()
        found = watching.pace.at(0.0)
        counted = {
            "report": sum(each.subproblems for each in report.attempts),
            "attempts": report.attempts[-1].subproblems_before + report.attempts[-1].subproblems,
            "board": shown["subproblems_done"],
            "pace": found.subproblems_done,
        }
        assert counted == dict.fromkeys(counted, status.subproblems_done), (kind, count)
        assert (found.pairs_done, shown["pairs_done"]) == (status.pairs_done, status.pairs_done)
        assert sum(shown["strip"]) * 13 == pytest.approx(status.subproblems_done, abs=0.01)


def test_an_attempt_that_was_killed_counts_what_it_saved(
    dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_file, "WRITING_SECONDS", 0.0)
    one, two = fast_path / "one.zarr", fast_path / "two.zarr"
    state = {path: path.with_name(f"{path.name}.oocattn") for path in (one, two)}

    def kill() -> None:
        shutil.copytree(state[one], state[two])  # the disk as a kill leaves it

    plan = plan_for(dataset, chunks=13, causal=True, partials="memory", checkpoint_seconds=3600.0)
    carry_out(plan, dataset, one, callbacks=[once_at("attended", 6, kill)])
    written = oocattn.report(two).attempts[-1]
    assert oocattn.status(two).subproblems_done == written.subproblems == 0
    oocattn.resume(two, engine="inline")
    assert [each.subproblems for each in oocattn.report(two).attempts] == [0, 26]


def test_work_that_is_done_twice_counts_once(dataset: Path, result: Path) -> None:
    """The record of an attempt whose partials were damaged while it worked."""

    def damage() -> None:
        folder = next(result.with_name(f"{result.name}.oocattn").glob("**/partials"))
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:-1] + b"!")

    plan = plan_for(dataset, chunks=13, partials="disk")
    events: list[Event] = []
    carry_out(plan, dataset, result, callbacks=[events.append, once_at("attended", 5, damage)])
    assert sum(event.kind == "attended" for event in events) > 26
    assert oocattn.report(result).attempts[-1].subproblems == 26
