"""What runs leave in a process, in its clusters and at the schedulers of others: nothing."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from distributed import Client, LocalCluster, Scheduler
from support import carry_out, plan_for

import oocattn
from oocattn.errors import BudgetError, TaskError, TimeLimitError
from oocattn.pipelines.attempt import Attempt
from oocattn.pipelines.engines.base import Engine
from oocattn.pipelines.engines.dask import tasks
from oocattn.pipelines.engines.dask.beats import ignore_beat
from oocattn.pipelines.engines.dask.cluster import answer, living_workers
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.pipelines.graph import Task


def test_a_scheduler_and_a_client_of_others_forget_the_beats_of_a_run(dataset: Path, result: Path, client: Client) -> None:
    def topics(dask_scheduler: Scheduler) -> list[str]:
        return [name for name in cast(Any, dask_scheduler)._broker._topics if name.startswith("oocattn")]

    carry_out(plan_for(dataset, chunks=3), dataset, result, client)
    assert client.run_on_scheduler(topics) == []
    handlers = cast(Any, client)._event_handlers
    assert {handler for name, handler in handlers.items() if name.startswith("oocattn")} == {ignore_beat}


def test_clusters_of_runs_that_have_ended_are_not_kept_in_memory(dataset: Path, fast_path: Path) -> None:
    def schedulers() -> int:
        gc.collect()
        return sum(type(each) is Scheduler for each in gc.get_objects())

    oocattn.attention(dataset, fast_path / "0.zarr", kernel="cpu")
    before = schedulers()
    for number in range(1, 4):
        oocattn.attention(dataset, fast_path / f"{number}.zarr", kernel="cpu")
    assert schedulers() <= before


def test_what_waits_for_a_silent_scheduler_ends_when_the_run_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that is stopped answers nothing for two minutes."""
    asked: list[float] = []

    def check() -> None:
        asked.append(1.0)
        if len(asked) == 3:
            raise TimeLimitError("time is up")

    with LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as own, Client(own) as client:

        async def never() -> None:
            await asyncio.sleep(60)

        with pytest.raises(TimeLimitError, match="time is up"):
            answer(client, never, 60, check)
        asked.clear()
        monkeypatch.setattr(client, "nthreads", never)
        with pytest.raises(TimeLimitError, match="time is up"):
            living_workers(client, 60, check)


@pytest.mark.parametrize("error", [BudgetError("poisoned"), OSError(28, "No space left on device")])
def test_a_worker_that_joins_hides_no_failure(error: Exception) -> None:
    of_run = object.__new__(Attempt)
    lanes: Any = SimpleNamespace(leaving=tuple, joined=lambda: {"tcp://new:1"}, workers=["w"])
    of_run._lanes, of_run._to_attend, of_run._began = lanes, 100, -1e9
    of_run._schedule, of_run._run = cast(Any, SimpleNamespace(lanes=1)), cast(Any, SimpleNamespace())
    of_run._check_workers = lambda: None  # type: ignore[method-assign]
    with pytest.raises((BudgetError, OSError, TaskError), match=r"poisoned|No space"):
        of_run._finish(Task(("attend", 0, 3), 0, ()), error)


def test_a_plan_of_more_gpus_is_carried_out_on_those_that_are_here(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oocattn.pipelines.engines.inline.arithmetic_of", lambda *_: {})
    engine: Engine = InlineEngine(2)
    engine.enlist(cast(Any, SimpleNamespace(device="cuda", lanes=4, kernel="", problem=None)), *cast(Any, (None,) * 3))
    assert engine.lane_count == 2


def test_a_lane_that_cannot_be_opened_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(folder: Path) -> Any:
        folder.mkdir()
        return SimpleNamespace(
            journal=SimpleNamespace(mirror=SimpleNamespace(passing=True)), paths=SimpleNamespace(state=folder)
        )

    def refuse(*_: object) -> None:
        raise BudgetError("no room")

    monkeypatch.setattr(tasks, "Lane", refuse)
    run: Any = SimpleNamespace(journal=SimpleNamespace(mirror=object()), elsewhere=elsewhere)
    worker: Any = SimpleNamespace(id="id", address="tcp://127.0.0.1:1", local_directory=str(tmp_path))
    with pytest.raises(BudgetError, match="no room"):
        asyncio.run(tasks.open_lane("abc", run, {"id": "cpu"}, worker))
    assert list(tmp_path.iterdir()) == []
