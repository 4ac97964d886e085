"""What lies beside an unfinished result, or at its path, is damaged, foreign or half removed: a run mends it or says so."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupting import EnoughError, interrupt, interrupted, uninterrupted
from support import assert_same_bits, carry_out, damage, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, IntegrityError, Plan, ResultExistsError
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.watch.events import Attended
from oocattn.storage.journal import journal
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("out", lambda found: found["shape"].__setitem__(1, 5)),
        ("out", lambda found: found.__setitem__("data_type", "int32")),
        ("lse", lambda found: found["chunk_grid"]["configuration"]["chunk_shape"].__setitem__(2, 3)),
        ("", lambda found: found["attributes"]["oocattn"]["problem"].__setitem__("scale", 0.25)),
        ("out", None),
    ],
    ids=["shape", "dtype", "chunks", "scale", "garbage"],
)
def test_a_growing_result_with_other_metadata_is_refused(
    dataset: Path, result: Path, where: str, change: Callable[[dict[str, Any]], object] | None
) -> None:
    interrupted(plan_for(dataset, chunks=7, causal=True), dataset, result, "written", 8)
    paths = ResultPaths.at(result)
    metadata = paths.unfinished / where / "zarr.json"
    if change is None:
        metadata.write_text("{ nonsense")
    else:
        edit(metadata, change)
    with pytest.raises(IntegrityError, match="damaged"):
        oocattn.resume(result, engine="inline")
    assert not result.exists()


@pytest.mark.parametrize("array", ["out", "lse"])
@pytest.mark.parametrize("spoil", [lambda content: None, lambda content: content[:-1]], ids=["missing", "short"])
def test_a_finished_chunk_whose_file_is_not_there_is_computed_again(
    dataset: Path, result: Path, array: str, spoil: Callable[[bytes], bytes | None]
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, "written", 8)
    paths = ResultPaths.at(result)
    damage(sorted((paths.unfinished / array).glob("c.*"))[0], spoil)
    found = oocattn.resume(result, engine="inline")
    assert_same_bits(found, right)
    assert found.report.recomputed == 1


@pytest.mark.parametrize("array", ["out", "lse"])
def test_a_folder_in_the_place_of_a_chunk_is_named(dataset: Path, result: Path, array: str) -> None:
    interrupted(plan_for(dataset, chunks=7, causal=True), dataset, result, "written", 8)
    chunk = sorted((ResultPaths.at(result).unfinished / array).glob("c.*"))[0]
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(IntegrityError, match=rf"{chunk} is a folder: expected a file, or nothing; remove it"):
        oocattn.resume(result, engine="inline")
    chunk.rmdir()
    assert oocattn.resume(result, engine="inline").report is not None


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_many_partials_of_one_subproblem_may_be_damaged(fast_path: Path, result: Path, partials: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(340, heads=1))
    plan = plan_for(dataset, chunks=31, partials=partials)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, "attended", 12)
    paths = ResultPaths.at(result)
    files = sorted(paths.scratch.glob("partial-0-*-0"))
    assert len(files) >= 4
    for file in files:
        damage(file, lambda content: content[:-7] + bytes([content[-7] ^ 16]) + content[-6:])
    found = oocattn.resume(result, engine="inline")
    assert_same_bits(found, right)
    assert len(files) / 2 <= found.report.recomputed <= len(files)  # of those that are found at once, one is told


def test_what_is_counted_as_damaged_is_counted_once(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    interrupted(plan, dataset, result, "written", 8)
    paths = ResultPaths.at(result)
    record = sorted((paths.state / "finished").iterdir())[0]
    record.write_bytes(b"x" + record.read_bytes()[1:])
    real, failed = CpuDevice.launch, []

    def launch(device: CpuDevice, staged: Any, *rest: Any) -> Callable[[], Attended]:
        if len(failed) < 2:
            failed.append(staged)
            raise OSError(errno.EIO, "once more")
        return real(device, staged, *rest)

    monkeypatch.setattr(CpuDevice, "launch", launch)
    report = oocattn.resume(result, engine="inline").report
    assert (report.recomputed, report.retried) == (1, 2)


def test_a_record_that_cannot_be_read_counts_for_nothing(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    right = uninterrupted(plan, dataset)
    interrupted(plan, dataset, result, "written", 8)
    paths = ResultPaths.at(result)
    bad, real = sorted((paths.state / "finished").iterdir())[0], journal.read_record

    def read(path: Path) -> dict[str, Any]:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "read_record", read)
        assert oocattn.status(result).state == "interrupted"
        with pytest.raises(EnoughError):
            oocattn.resume(result, engine="inline", callbacks=[interrupt("attended", 1)])
    assert_same_bits(oocattn.resume(result, engine="inline"), right)


# What lies at the result's path


def carry_out_or_resume(resumed: bool, plan: Plan, dataset: Path, result: Path, listeners: list[Any]) -> None:
    if resumed:
        oocattn.resume(result, engine="inline", callbacks=listeners)
    else:
        carry_out(plan, dataset, result, callbacks=listeners)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_has_appeared_at_the_path_meanwhile_is_not_touched(
    dataset: Path, result: Path, resumed: bool, kind: str
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)

    def appear(event: Event | None = None) -> None:
        if kind == "file":
            result.write_text("precious")
        elif not result.exists():
            result.mkdir()
            (result / "thesis.txt").write_text("precious")

    if resumed:
        interrupted(plan, dataset, result, "written", 8)
        appear()
    listeners = [] if resumed else [lambda event: event.kind == "attended" and appear()]
    with pytest.raises(ResultExistsError, match="move it away and resume"):
        carry_out_or_resume(resumed, plan, dataset, result, listeners)
    precious = result if kind == "file" else result / "thesis.txt"
    assert precious.read_text() == "precious"
    result.rename(result.with_name("away"))
    assert oocattn.resume(result, engine="inline").report.subproblems == plan.subproblems


def test_a_result_that_was_being_replaced_comes_back_if_another_run_begins(dataset: Path, result: Path) -> None:
    """A run was killed between two renames, and then the dataset changed."""
    plan = plan_for(dataset, chunks=7, causal=True)
    old = carry_out(plan, dataset, result).out[...]
    paths = ResultPaths.at(result)
    result.rename(paths.replaced)
    with pytest.raises(EnoughError):
        carry_out(plan, dataset, result, callbacks=[interrupt("attended", 3)], overwrite=True)
    np.testing.assert_array_equal(oocattn.pipelines.existing.open_result(result).out[...], old)
    assert not paths.replaced.exists()


def test_a_finished_result_with_damaged_metadata_is_named(
    dataset: Path, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for(dataset, chunks=7, causal=True)
    carry_out(plan, dataset, result)
    for name in ("zarr.json", "out/zarr.json"):
        path = result / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 193):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            for use in (oocattn.verify, oocattn.resume):
                with suppress(IntegrityError, oocattn.ProblemError):
                    use(result)
        path.write_bytes(whole)
    ResultPaths.at(result).report.write_text("{")
    caplog.clear()
    assert oocattn.resume(result).report is None
    status = oocattn.status(result)
    assert (status.state, status.share, status.tokens_done) == ("finished", 1.0, plan.problem.queries)
    assert [record.message for record in caplog.records if "the report of the run cannot be read" in record.message]
