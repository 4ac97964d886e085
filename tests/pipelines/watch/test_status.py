"""The state of a result is told from outside: none, running, interrupted, finished; a damaged file is an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from distributed import Client
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, IntegrityError, Status, clock
from oocattn.cli.main import main
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130))


def test_from_none_over_running_to_finished(client: Client, dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"
    assert oocattn.status(result) == Status("none", result=str(result))
    assert str(oocattn.status(result)).startswith(f"none: no run to {result} has begun;")
    seen: list[tuple[str, Status]] = []
    plan = plan_for(dataset, chunks=13)
    carry_out(plan, dataset, result, client, callbacks=[lambda event: seen.append((event.kind, oocattn.status(result)))])
    while_running = [status for kind, status in seen if kind not in ("committed", "ended")]
    assert {status.state for status in while_running} == {"running"}
    assert {status.subproblems for status in while_running} == {13}
    first = while_running[0]
    assert first.subproblems_done == 0
    assert "process" in first.holder
    assert first.dashboard == client.dashboard_link
    assert all(0 <= status.subproblems_done <= 13 for status in while_running)
    finished = oocattn.status(result)
    assert finished.state == "finished"
    assert str(finished).startswith("finished in ")


def test_progress_is_written_down(dataset: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oocattn.pipelines.watch.status_file.WRITING_SECONDS", 0.0)
    result = fast_path / "result.zarr"
    seen: list[Status] = []

    def look(event: Event) -> None:
        if event.kind == "attended":
            seen.append(oocattn.status(result))

    carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[look])
    assert [status.subproblems_done for status in seen] == list(range(1, 14))
    assert all(status.rate > 0 and status.seconds > 0 for status in seen)
    assert seen[-1].seconds_left == 0
    assert "13 of 13 subproblems, 130 of 130 tokens (100%)" in str(seen[-1])
    assert "tokens/s" in str(seen[0])


def test_a_run_that_failed_is_interrupted_and_says_why(dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"

    def refuse(event: Event) -> None:
        if event.kind == "attended":
            raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough"):
        carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[refuse])
    status = oocattn.status(result)
    assert status.state == "interrupted"
    assert status.error == "SystemExit: enough"
    assert "it ended: SystemExit: enough\nabout " in str(status)
    assert str(status).endswith(f"left; no process works on it\ngo on with: oocattn.resume({str(result)!r})")


def test_a_run_that_was_killed_says_that_its_process_is_gone_and_what_is_on_disk() -> None:
    killed = Status("interrupted", 10, subproblems_done=4, tokens=1000, bytes_read=5 << 30, seconds_left=90.0)
    assert str(killed).splitlines() == [
        "interrupted: 4 of 10 subproblems are on disk, 400 of 1,000 tokens (40%)",
        "5 GiB read, 0 B of partials, 0 B written",
        "its process was killed, the machine went down or its disk was full; about 90 s left; no process works on it",
    ]


def test_before_the_first_subproblem_is_done_the_plan_says_how_long_it_takes(fast_path: Path) -> None:
    running = Status("running", 10, tokens=1000, bytes_read=5 << 30, seconds_left=90.0, holder="held by somebody")
    assert str(running).splitlines() == [
        "running: 0 of 10 subproblems, 0 of 1,000 tokens (0%)",
        "5 GiB read, 0 B of partials, 0 B written; nothing saved yet",
        "about 90 s left; held by somebody; dashboard none",
    ]


def test_a_run_that_does_not_go_on_says_why_and_since_when_not_how_long_it_takes() -> None:
    why = "worker tcp://host:1 is paused"
    stalled = Status("running", 10, seconds_left=11.0, holder="somebody", stalled=why, stalled_since=clock.now() - 45)
    head, reason, last = str(stalled).splitlines()
    assert head == "stalled: 0 of 10 subproblems, 0 of 0 tokens (0%)"
    assert re.fullmatch(rf"no progress for 45(\.\d)? s: {why}", reason)
    assert last == "somebody; dashboard none"


def test_a_run_whose_process_is_stopped_is_stalled(fast_path: Path) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock):
        paths.status.write_text(json.dumps(asdict(Status("running", 10, seconds_left=11.0))))
        assert " left" in str(oocattn.status(paths.result))
        hour_ago = time.time() - 3600
        os.utime(paths.lock, (hour_ago, hour_ago))
        stopped = str(oocattn.status(paths.result))
    assert re.search(r"^stalled: 0 of 10 .*\nno progress for 60 min: process \d+ on host .* is stopped.*kill -CONT", stopped)
    assert " left" not in stopped


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"surprise": 1}', '{"subproblems": "many"}', '{"subproblems": 4, "subproblems_done": -1}'),
        *('{"rate": null}', '{"tokens": [1]}', '{"seconds": 1e400}', '{"holder": 1}'),
        *('{"tokens": 1%s}' % ("0" * 400), '{"subproblems": 2.5}', '{"subproblems": true}', '{"seconds": NaN}'),
    ],
)
def test_a_damaged_status_is_an_error(fast_path: Path, content: str) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock):
        paths.status.write_text(content)
        with pytest.raises(IntegrityError, match=r"status\.json"):
            str(oocattn.status(paths.result))


def test_a_status_of_an_older_version_is_read(fast_path: Path) -> None:
    paths, status = ResultPaths.at(fast_path / "result.zarr"), Status("running", 10, 4, 1000, bytes_read=7)
    paths.make_state()
    with FileLock(paths.lock):
        added = ("result", "certificate", "verdict", "stalled", "stalled_since")
        content = {name: value for name, value in asdict(status).items() if name not in added}
        paths.status.write_text(json.dumps(content))
        found = oocattn.status(paths.result)
    assert (found.share, found.bytes_read, found.stalled) == (0.4, 7, "")


def test_status_ignores_leftovers_of_a_finished_run(dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"
    carry_out(plan_for(dataset), dataset, result)
    finished = oocattn.status(result)
    ResultPaths.at(result).status.write_text("{")
    assert oocattn.status(result) == finished
    assert finished.state == "finished"


def test_a_damaged_status_does_not_hide_what_the_journal_says(
    dataset: Path, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = fast_path / "result.zarr"

    def refuse(event: Event) -> None:
        if event.kind == "written":
            raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough"):
        carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[refuse])
    whole = oocattn.status(result)
    assert whole.subproblems_done > 0
    for content in ("{", json.dumps({**asdict(whole), "rate": None})):
        ResultPaths.at(result).status.write_text(content)
        found = oocattn.status(result)
        assert "the rate of the run are not known" in caplog.text
        assert (found.state, found.subproblems_done) == ("interrupted", whole.subproblems_done)
        assert (found.tokens, found.tokens_done) == (whole.tokens, whole.tokens_done)
        assert "tokens/s" not in str(found)
        caplog.clear()


def test_an_interrupted_second_run_does_not_hide_the_first_result(dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"
    carry_out(plan_for(dataset), dataset, result)
    report = json.loads(ResultPaths.at(result).report.read_text())

    def refuse(event: Event) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        carry_out(plan_for(dataset, causal=True), dataset, result, callbacks=[refuse], overwrite=True)
    assert oocattn.status(result).state == "interrupted"
    assert json.loads(ResultPaths.at(result).report.read_text()) == report
    assert oocattn.verify(result, rows=8).passed


# Share, counts and time left of every state


def test_a_finished_run_has_share_one_and_the_counts_of_its_report(dataset: Path, fast_path: Path) -> None:
    result = fast_path / "result.zarr"
    report = carry_out(plan_for(dataset, chunks=13), dataset, result).report
    status = oocattn.status(result)
    assert (status.share, status.subproblems, status.subproblems_done) == (1.0, 13, 13)
    assert (status.tokens, status.tokens_done, status.seconds_left) == (130, 130, 0.0)
    assert (status.seconds, status.rate) == (report.seconds, report.rate)
    assert (status.pairs, status.pairs_done) == (report.pairs, report.pairs)
    assert report.pairs > 0
    found = (status.bytes_read, status.bytes_saved, status.bytes_written)
    assert found == (report.bytes_read, report.bytes_partials, report.bytes_written)
    assert abs(clock.now() - status.saved) < 60


@pytest.mark.parametrize("report", [None, "{", "[]", '{"seconds": 1}'])
def test_a_finished_result_without_a_report_has_share_one(dataset: Path, fast_path: Path, report: str | None) -> None:
    paths = ResultPaths.at(carry_out(plan_for(dataset), dataset, fast_path / "result.zarr").path)
    if report is None:
        shutil.rmtree(paths.state)
    else:
        paths.report.write_text(report)
    status = oocattn.status(paths.result)
    assert (status.state, status.share, status.seconds_left) == ("finished", 1.0, 0.0)
    assert (status.subproblems, status.tokens, status.tokens_done) == (0, 130, 130)
    assert str(status) == "finished"


def test_a_wait_for_share_one_ends(dataset: Path, fast_path: Path) -> None:
    result, shares = fast_path / "result.zarr", [oocattn.status(fast_path / "result.zarr").share]

    def look(event: Event) -> None:
        shares.append(oocattn.status(result).share)

    carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[look])
    shares.append(oocattn.status(result).share)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_the_status_without_a_run_has_no_progress_and_no_time_left(fast_path: Path) -> None:
    status = oocattn.status(fast_path / "result.zarr")
    assert (status.share, status.tokens_done, status.seconds_left) == (0.0, 0, None)


def test_a_run_that_has_not_planned_yet_is_starting(fast_path: Path) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    paths.make_state()
    with FileLock(paths.lock):
        status = oocattn.status(paths.result)
    assert (status.state, status.share, status.seconds_left, status.result) == ("running", 0.0, None, str(paths.result))
    assert str(status).startswith("running: starting; ")


@pytest.mark.parametrize("alive", [False, True])
def test_without_a_status_file_the_plan_says_how_much_there_is(dataset: Path, fast_path: Path, alive: bool) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")
    plan = plan_for(dataset, chunks=13)

    def refuse(event: Event) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        carry_out(plan, dataset, paths.result, callbacks=[refuse])
    paths.status.unlink()
    with FileLock(paths.lock) if alive else nullcontext():
        status = oocattn.status(paths.result)
    assert status.state == ("running" if alive else "interrupted")
    assert (status.share, status.subproblems, status.tokens) == (0.0, 13, 130)
    assert status.seconds_left == pytest.approx(plan.seconds)
    assert "0 of 13 subproblems" in str(status)


@pytest.mark.parametrize("content", ["", "damaged", "00000000 {}"])
def test_a_damaged_journal_is_an_error_that_says_what_to_do(
    dataset: Path, fast_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ResultPaths.at(fast_path / "result.zarr")

    def refuse(event: Event) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        carry_out(plan_for(dataset), dataset, paths.result, callbacks=[refuse])
    (paths.state / "plan.json").write_text(content)
    for use in (oocattn.status, oocattn.resume, lambda result: oocattn.attention(dataset, result)):
        with pytest.raises(IntegrityError, match=r"plan\.json.* cannot be resumed: begin again with overwrite=True$"):
            use(paths.result)
    assert main(["status", str(paths.result)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert oocattn.attention(dataset, paths.result, overwrite=True).report.pairs > 0


def test_a_damaged_journal_beside_a_finished_result_is_a_warning(
    dataset: Path, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = ResultPaths.at(carry_out(plan_for(dataset), dataset, fast_path / "result.zarr").path)
    finished = oocattn.status(paths.result)
    (paths.state / "plan.json").write_text("damaged")
    assert oocattn.status(paths.result) == finished
    assert "the result itself is not affected" in caplog.text


def test_every_field_of_a_status_is_documented() -> None:
    for field in fields(Status):
        assert f"`{field.name}`" in Status.__doc__
