"""A run says every second that it lives, whatever its tasks do, and `status` tells a run that does not."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, Status, clock
from oocattn.pipelines.watch import status_file
from oocattn.pipelines.watch.attempts import with_heartbeat
from oocattn.pipelines.watch.events import Committed, Failed, Started
from oocattn.pipelines.watch.status_file import StatusFile
from oocattn.storage.journal import lock
from oocattn.storage.journal.claims import Holder
from oocattn.storage.journal.lock import FileClaim, FileLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.state_folder import folder_of_url


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130))


@pytest.fixture(autouse=True)
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "BEAT_SECONDS", 0.005)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it did not come about in a minute"
        time.sleep(0.005)


def hearts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "oocattn-heart"]


def started(dataset: Path) -> Started:
    now = clock.now()
    plan = plan_for(dataset, chunks=13)
    return Started(start=now, stop=now, plan=plan, dashboard="", left=13, resumed=False, recomputed=0)


def test_the_status_is_written_between_events_too_and_its_time_left_gets_less(dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"
    seen: list[Status] = []

    def wait_for_beats(event: Event) -> None:
        if event.kind == "started":
            seen.append(oocattn.status(result))
            wait_until(lambda: oocattn.status(result).beat > seen[0].beat + 0.01)
            seen.append(oocattn.status(result))

    plan = replace(plan_for(dataset, chunks=13), seconds=1e6)
    carry_out(plan, dataset, result, callbacks=[wait_for_beats])
    first, later = seen
    assert later.seconds > first.seconds
    assert first.seconds_left is not None
    assert later.seconds_left is not None
    assert later.seconds_left < first.seconds_left
    assert not (fast_path / "result.zarr.oocattn" / "status.json").exists()
    wait_until(lambda: not hearts())


@pytest.mark.parametrize("how", ["committed", "failed", "left"])
def test_the_heart_is_a_daemon_that_stops_with_the_run(dataset: Path, fast_path: Path, how: str) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock) as held, StatusFile(paths.status, held.claim) as written:
        written(started(dataset))
        assert [heart.daemon for heart in hearts()] == [True]
        now = clock.now()
        if how == "committed":
            written(Committed(start=now, stop=now, path="somewhere"))
        elif how == "failed":
            written(Failed(start=now, stop=now, error="no reason"))
        else:
            written.__exit__(None, None, None)
        wait_until(lambda: not hearts())
        assert paths.status.exists() == (how != "committed")


def test_a_heart_whose_lock_was_lost_stops_and_writes_nothing(dataset: Path, fast_path: Path) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock) as held, StatusFile(paths.status, held.claim) as written:
        written(started(dataset))
        paths.lock.unlink()
        with FileLock(paths.lock):
            wait_until(lambda: not hearts())
            paths.status.unlink()
            time.sleep(0.02)
            assert not paths.status.exists()


def test_a_run_that_waits_for_a_listener_stalls_and_names_it(
    dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_file, "KEPT_SECONDS", 0.01)
    result = fast_path / "result.zarr"
    found: list[Status] = []

    def dawdle(event: Event) -> None:
        if event.kind == "attended" and not found:
            wait_until(lambda: bool(oocattn.status(result).stalled))
            found.append(oocattn.status(result))

    carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[dawdle])
    assert "dawdle has not returned" in found[0].stalled
    assert str(found[0]).startswith("stalled: ")


@pytest.mark.parametrize(("silence", "stalled"), [(0, False), (8, False), (13, True)])
@pytest.mark.parametrize("begun", [True, False], ids=["begun", "starting"])
def test_a_process_that_is_silent_for_ten_seconds_is_stopped(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, silence: float, stalled: bool, begun: bool
) -> None:
    monkeypatch.setattr(lock, "BEAT", 3600.0)
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock):
        if begun:
            paths.status.write_text(json.dumps(asdict(Status("running", 10, seconds_left=11.0))))
        then = time.time() - silence
        os.utime(paths.lock, (then, then))
        found = oocattn.status(paths.result)
    assert found.state == "running"
    assert bool(found.stalled) == stalled
    assert str(found).startswith("stalled: " if stalled else "running: ")
    assert ("kill -CONT" in str(found)) == stalled


@pytest.mark.parametrize(("silence", "stalled"), [(60, False), (600, True)])
def test_a_process_of_another_host_is_known_by_its_beat(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, silence: float, stalled: bool
) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock) as held:
        elsewhere = replace(held.holder, kernel="another", host="another")
        monkeypatch.setattr("oocattn.pipelines.watch.status.lock_holder", lambda path: elsewhere)
        status = Status("running", 10, seconds_left=11.0, beat=clock.now() - silence)
        paths.status.write_text(json.dumps(asdict(status)))
        assert bool(oocattn.status(paths.result).stalled) == stalled
    assert not Holder.this_process().shares_kernel(elsewhere)


def test_a_finished_run_has_all_that_its_report_has(dataset: Path, fast_path: Path) -> None:
    report = carry_out(plan_for(dataset, chunks=13), dataset, fast_path / "result.zarr").report
    found = oocattn.status(fast_path / "result.zarr")
    assert found.report == report
    assert str(report) in str(found)
    assert found.share == 1.0


def test_a_disk_that_takes_nothing_does_not_stop_the_heart(
    dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    refused: list[str] = []

    def refuse(path: Path, text: str, *, synced: bool) -> None:
        refused.append(text)
        raise OSError(28, "No space left on device")

    with FileLock(paths.lock) as held, StatusFile(paths.status, held.claim) as written:
        monkeypatch.setattr(status_file, "write_text", refuse)
        written(started(dataset))
        wait_until(lambda: len(refused) > 2)
        monkeypatch.undo()
        wait_until(paths.status.exists)
    assert FileClaim(paths.lock, held.claim.token).holds() is False


@pytest.mark.parametrize("scratch", [None, "elsewhere", "store"])
def test_the_status_of_a_live_run_to_a_url_is_told_without_its_store(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: str | None
) -> None:
    def ask(*_: object, **__: object) -> ResultPaths:
        raise AssertionError("the store was asked")

    monkeypatch.chdir(fast_path)
    monkeypatch.setattr(ResultPaths, "at", ask)
    state = folder_of_url("s3://bucket/folder/out.zarr", scratch)
    assert state.parent == fast_path
    state.mkdir()
    (state / "status.json").write_text(json.dumps(asdict(Status("running", 10, 3, pairs=100, pairs_done=34))))
    with FileLock(state / "lock"):
        found = oocattn.status("s3://bucket/folder/out.zarr", scratch=scratch)
        assert (found.state, found.share, found.result) == ("running", 0.34, "s3://bucket/folder/out.zarr")
        assert f"process {os.getpid()} on host" in found.holder
    with pytest.raises(AssertionError, match="the store was asked"):
        oocattn.status("s3://bucket/folder/out.zarr", scratch=scratch)


def test_the_last_heartbeat_of_a_killed_attempt_counts_its_pairs(dataset: Path, fast_path: Path) -> None:
    carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "result.zarr")
    (attempt,) = oocattn.report(fast_path / "result.zarr").attempts
    recorded = replace(attempt, end="", pairs=50, pairs_before=100)
    beaten = Status("running", pairs=1000, pairs_done=400, beat=attempt.seen + 1)
    assert with_heartbeat(recorded, beaten).pairs == 300
    assert with_heartbeat(recorded, replace(beaten, pairs_done=120)).pairs == 50
