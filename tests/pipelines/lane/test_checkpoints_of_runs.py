"""Checkpoints of whole runs: when they are made, what they take on disk, and runs that go on from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from interrupting import uninterrupted
from support import (
    BESIDE,
    Recorder,
    assert_same_bits,
    carry_out,
    normal_arrays,
    plan_for,
    replanned,
    write_dataset,
)

import oocattn
from oocattn import Event
from oocattn.pipelines.lane.partials import files as partial_files
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


def scratch_bytes(result: Path) -> int:
    total = 0
    for path in ResultPaths.at(result).scratch.glob("*"):
        with suppress(FileNotFoundError):  # it has just been replaced or removed
            total += path.stat().st_size
    return total


def in_the_middle(look: Callable[[Event], None], count: int = 9) -> Callable[[Event], None]:
    seen = []

    def listen(event: Event) -> None:
        if event.kind == "attended":
            seen.append(event)
            if len(seen) == count:
                look(event)

    return listen


def test_checkpoints_are_made_at_the_interval_and_reported(dataset: Path, result: Path) -> None:
    plan = replanned(plan_for(dataset, chunks=31, causal=True, partials="memory"), checkpoint_seconds=0.02)
    right = uninterrupted(plan_for(dataset, chunks=31, causal=True), dataset)
    recorder, most = Recorder([]), [0]

    def measure(event: Event) -> None:
        most[0] = max(most[0], scratch_bytes(result))

    found = carry_out(plan, dataset, result, callbacks=[recorder, measure])
    assert_same_bits(found, right)
    told = [event for event in recorder.of("attended") if event.checkpointed]
    assert len(told) > 3
    assert 0 < most[0] <= plan.scratch_disk
    assert found.report.bytes_partials == sum(event.checkpoint_bytes for event in told)
    assert all(any(span.resource == "save" for span in event.spans) for event in told)
    assert {path.name for path in ResultPaths.at(result).state.iterdir()} == BESIDE


def test_without_checkpoints_nothing_is_saved(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=13, causal=True, partials="memory", checkpoint_seconds=0.0)
    assert plan.scratch_disk == 0
    assert "never saved" in str(plan)

    def stop(event: Event) -> None:
        raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough"):
        carry_out(plan, dataset, result, callbacks=[in_the_middle(stop)])
    assert scratch_bytes(result) == 0
    assert_same_bits(oocattn.resume(result, engine="inline"), uninterrupted(plan, dataset))


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replanned(plan_for(dataset, chunks=31, causal=True, partials="memory"), checkpoint_seconds=0.02)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(partial_files, "write_blocks", full)
        with pytest.raises(OSError, match="no space left for the result and its partials; make room and resume"):
            carry_out(plan, dataset, result)
    assert_same_bits(oocattn.resume(result, engine="inline"), uninterrupted(plan, dataset))


@pytest.mark.parametrize(("partials", "chunks"), [("memory", 1), ("memory", 7), ("memory", 31), ("disk", 7), ("disk", 31)])
def test_scratch_stays_below_what_the_plan_says(fast_path: Path, result: Path, partials: str, chunks: int) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(3000, head_dim=64))
    plan = plan_for(dataset, chunks=chunks, decomposition="cqs", partials=partials)
    most = [0]

    def measure(event: Event) -> None:
        most[0] = max(most[0], scratch_bytes(result))

    carry_out(replanned(plan, checkpoint_seconds=0.01), dataset, result, callbacks=[measure])
    assert most[0] <= plan.scratch_disk
    assert most[0] > 0 or chunks == 1  # which may be merged before its first checkpoint
