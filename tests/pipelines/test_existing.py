"""What is at a result's path is found by one look, before planning and under the lock; its run goes to workers whole."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Client
from interrupting import interrupted
from support import BESIDE, Recorder, carry_out, plan_for, run_of

from oocattn import ResultExistsError
from oocattn.pipelines.existing import Found, Request, find
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths


def test_nothing_an_unfinished_run_and_a_finished_result_are_told_apart(client: Client, dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=7)
    request = Request(plan.problem, Dataset.open(dataset), ResultPaths.at(result))
    again = replace(request, overwrite=True)
    assert find(request) is Found.NOTHING
    interrupted(plan, dataset, result, "attended", 1)
    found = find(request)
    assert isinstance(found, Run)
    assert found.plan.digest == plan.digest
    assert find(again) is Found.NOTHING
    carry_out(plan, dataset, result, client)
    assert find(request) is Found.FINISHED
    assert find(again) is Found.NOTHING
    with pytest.raises(ResultExistsError, match=r"is not the result of this run \(its problem differs: causal False"):
        find(replace(request, problem=replace(plan.problem, causal=True)))


def test_a_result_that_another_process_finished_meanwhile_is_not_computed_again(
    client: Client, dataset: Path, result: Path
) -> None:
    recorder = Recorder([])
    first = carry_out(plan_for(dataset), dataset, result, client)
    second = carry_out(plan_for(dataset), dataset, result, client, callbacks=[recorder])
    assert second.report == first.report
    assert recorder.events == []
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE


def test_the_record_of_a_run_is_sent_to_workers_whole_and_small(dataset: Path, fast_path: Path) -> None:
    run = run_of(dataset.parent, plan_for(dataset))
    sent = pickle.dumps(run)
    assert len(sent) < 64 << 10
    lane = Lane(pickle.loads(sent), "cpu")
    lane.close()


def test_a_run_that_was_only_read_has_neither_dataset_nor_lock(client: Client, dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=7)
    interrupted(plan, dataset, result, "attended", 1)
    found = find(Request(plan.problem, Dataset.open(dataset), ResultPaths.at(result)))
    assert isinstance(found, Run)
    for name in ("dataset", "state"):
        with pytest.raises(ValueError, match="was read from its journal: expected one"):
            getattr(found, name)
