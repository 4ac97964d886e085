"""The full report of a run: every attempt, also those that were killed, on one small page that says what its JSON says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import look_at
from support import BESIDE, carry_out, make_event, normal_arrays, plan_for, run_of, write_dataset

import oocattn
from oocattn import FullReport, IntegrityError, ProblemError, ResultExistsError
from oocattn.cli.main import main
from oocattn.pipelines.watch.attempt_log import AttemptLog
from oocattn.pipelines.watch.attempts import (
    MOST_ATTEMPTS,
    MOST_DETAILED,
    MOST_ROWS,
    MOST_TEXT,
    Attempts,
    BusyRow,
    Planned,
    read_attempts,
)
from oocattn.pipelines.watch.events import Memory, Span
from oocattn.pipelines.watch.series import MOST_BINS
from oocattn.records import from_json
from oocattn.storage.paths import ResultPaths
from oocattn.units import format_bytes

HOSTILE = "<script>alert('x')</script>&\x1b[2J\u202e"


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130))


def state_of(result: Path) -> Path:
    return result.with_name(f"{result.name}.oocattn")


def killing(result: Path, copy: Path, after: int) -> Callable[[oocattn.Event], None]:
    """A listener that has the disk, as it is when so many subproblems are done, as what a kill leaves of another run."""
    done: list[oocattn.Event] = []

    def look(event: oocattn.Event) -> None:
        done.extend([event] * (event.kind == "attended"))
        if len(done) == after and not state_of(copy).exists():
            shutil.copytree(state_of(result), state_of(copy))

    return look


def page_text(page: str) -> str:
    """What a page shows, without its tags."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", body))


def test_a_finished_run_has_its_page_and_json_beside_it(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=13)
    found = carry_out(plan, dataset, result).report
    assert {path.name for path in state_of(result).iterdir()} == BESIDE
    report = oocattn.report(result)
    kept = json.loads((state_of(result) / "full-report.json").read_text())
    assert kept == {**report.to_json(), "made": kept["made"]}
    (attempt,) = kept["attempts"]
    assert (attempt["end"], attempt["subproblems"], kept["status"]["state"]) == ("finished", 13, "finished")
    assert [attempt[name] for name in ("bytes_read", "bytes_written", "pairs")] == [
        found.bytes_read, found.bytes_written, found.pairs,
    ]  # fmt: skip
    assert attempt["busy"]["compute"] == pytest.approx(found.compute_busy * found.seconds, rel=0.05, abs=0.005)
    shown = page_text((state_of(result) / "report.html").read_text())
    link = {link["name"]: link for link in kept["links"]}
    assert [link[name]["amount"] for name in ("read", "write")] == [found.bytes_read, found.bytes_written]
    assert {name: link[name]["predicted"] for name in ("read", "compute")} == {
        name: plan.link(name).amount for name in ("read", "compute")
    }
    for words in (
        kept["headline"], kept["problem"], kept["command"], attempt["process"], str(result),
        format_bytes(link["read"]["amount"]), format_bytes(link["read"]["predicted"]), format_bytes(link["write"]["amount"]),
        format_bytes(attempt["peak_host"]) if attempt["peak_host"] else "-", "Not verified",
    ):  # fmt: skip
        assert words in shown


def test_a_run_that_was_killed_and_resumed_twice_shows_three_attempts(dataset: Path, fast_path: Path) -> None:
    one, two, three = (fast_path / f"{name}.zarr" for name in ("one", "two", "three"))
    plan = plan_for(dataset, chunks=13, checkpoint_seconds=0.0001)
    carry_out(plan, dataset, one, callbacks=[killing(one, two, after=4)])
    killed = oocattn.report(two)
    assert (killed.status.state, [each.end for each in killed.attempts]) == ("interrupted", ["killed"])
    assert "only its last heartbeat is known" in page_text(killed.page())
    oocattn.resume(two, engine="inline", callbacks=[killing(two, three, after=3)])
    oocattn.resume(three, engine="inline")
    report = oocattn.report(three)
    assert [each.end for each in report.attempts] == ["killed", "killed", "finished"]
    before = [each.subproblems_before for each in report.attempts]
    assert before[0] == 0 < before[1] < before[2]
    assert report.attempts[-1].subproblems == 13 - before[2]
    assert report.attempts[-1].pairs == plan.problem.pairs - (report.attempts[-1].pairs_before or 0)
    assert "within 3 attempts" in report.headline
    assert page_text(report.page()).count(" killed ") >= 4  # in the table, and above the timelines or in the log


def test_an_attempt_says_why_it_ended(dataset: Path, result: Path) -> None:
    def refuse(error: BaseException, event: oocattn.Event) -> None:
        if event.kind == "attended":
            raise error

    for error in (KeyboardInterrupt(), SystemExit("enough")):
        with pytest.raises(type(error)):
            carry_out(plan_for(dataset, chunks=13), dataset, result, callbacks=[lambda event, e=error: refuse(e, event)])
    report = oocattn.report(result)
    assert [(each.end, each.words) for each in report.attempts] == [
        ("stopped", "interrupted by Ctrl-C or another signal"),
        ("failed", "SystemExit: enough"),
    ]
    assert "SystemExit: enough" in page_text(report.page())


def test_a_running_run_has_a_page(dataset: Path, result: Path) -> None:
    seen: list[FullReport] = []

    def look(event: oocattn.Event) -> None:
        if event.kind == "attended":
            seen.append(oocattn.report(result))

    carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[look])
    assert {report.status.state for report in seen} == {"running"}
    assert {report.attempts[-1].end for report in seen} == {""}
    assert "running at " in page_text(seen[-1].page())


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_without_recorded_attempts_says_what_is_there(dataset: Path, fast_path: Path, finished: bool) -> None:
    one, two = fast_path / "one.zarr", fast_path / "two.zarr"
    carry_out(plan_for(dataset, chunks=7, causal=True), dataset, one, callbacks=[killing(one, two, after=3)])
    result = one if finished else two
    (state_of(result) / "attempts.json").unlink()
    report = oocattn.report(result)
    assert (report.attempts, "no attempts are recorded" in report.notes[0]) == ((), True)
    shown = page_text(report.page())
    assert "sums over all attempts" not in shown
    assert "130 tokens" in shown
    assert f"oocattn run {dataset} {result} --causal" in shown
    shutil.rmtree(state_of(one))
    assert page_text(oocattn.report(one).page())


def test_nothing_is_reported_of_no_run(fast_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IntegrityError, match="no run to it has begun"):
        oocattn.report(fast_path / "none.zarr")
    assert main(["report", str(fast_path / "none.zarr")]) == 1
    assert not list(fast_path.glob("none*"))


def damaged(content: dict[str, Any]) -> dict[str, Any]:
    content["attempts"] *= MOST_ATTEMPTS + 1
    return content


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[", "\x00", '{"format": 1e400}',
        damaged,
        lambda found: found["planned"].update(seconds=-1.0) or found,
        lambda found: found["planned"].update(plan="x" * 30_000) or found,
        lambda found: found["attempts"][0].update(end="won") or found,
        lambda found: found["attempts"][0]["over_time"].update(width=0.0) or found,
        lambda found: found["attempts"][0]["over_time"].update(host=[1] * 300) or found,
        lambda found: found["attempts"][0]["over_time"]["busy"][0].update(percent="1") or found,
    ],
)  # fmt: skip
def test_attempts_that_no_run_wrote_are_not_believed(dataset: Path, result: Path, content: Any) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    path = state_of(result) / "attempts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content(json.loads(path.read_text()))))
    report = oocattn.report(result)
    assert report.attempts == ()
    assert "the attempts at the run are not known" in report.notes[0]
    assert report.page()


def test_hostile_words_are_escaped(fast_path: Path) -> None:
    dataset, result = fast_path / HOSTILE.replace("/", "_"), fast_path / f"{HOSTILE.replace('/', '_')}.zarr"
    write_dataset(dataset, normal_arrays(130))
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    path = state_of(result) / "attempts.json"
    found = json.loads(path.read_text())
    found["planned"] |= dict.fromkeys(("problem", "dataset", "command", "plan", "device", "kernel"), HOSTILE)
    (attempt,) = found["attempts"]
    attempt |= {"words": HOSTILE, "process": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    attempt["log"] = [{"moment": 1e12, "words": HOSTILE}]
    attempt["over_time"]["busy"][0]["lane"] = f'"{HOSTILE}'
    attempt["over_time"]["rates"][HOSTILE] = [1.0]
    path.write_text(json.dumps(found))
    report = oocattn.report(result)
    page = report.page()
    assert len(report.attempts) == 1
    assert page.count("<script>") == 1  # its own
    assert not {"\x1b", "\u202e"} & {*page, *str(report)}
    assert "&lt;script&gt;alert" in page


def test_a_report_of_a_result_in_a_store_is_beside_it_there(dataset: Path, fast_path: Path) -> None:
    paths = ResultPaths.at("memory://reports/out.zarr", fast_path / "state")
    carry_out(plan_for(dataset, chunks=7), dataset, paths)
    assert paths.beside is not None
    assert {*paths.beside.list()} == BESIDE
    assert not (fast_path / "state").exists()
    kept = json.loads(paths.beside.read("full-report.json") or b"")
    assert [each["end"] for each in kept["attempts"]] == ["finished"]
    assert main(["report", "memory://reports/out.zarr"]) == 0
    assert b"finished in" in (paths.beside.read("report.html") or b"")


def test_files_of_others_are_not_replaced(dataset: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    mine = result.with_name("mine.html")
    mine.write_text("<!DOCTYPE html>\n<p>mine")
    report = oocattn.report(result)
    with pytest.raises(ResultExistsError, match="was not written by oocattn"):
        report.to_html(mine)
    for name in ("report.html", "full-report.json"):
        before = (state_of(result) / name).read_text()
        (state_of(result) / name).write_text("mine")
        assert main(["report", str(result)]) == 1
        assert "was not written by oocattn" in capsys.readouterr().err
        assert (state_of(result) / name).read_text() == "mine"
        (state_of(result) / name).write_text(before)
    assert main(["report", str(result)]) == 0
    assert main(["report", str(result), "--output", str(mine)]) == 1
    other = result.with_name("other.html")
    assert [main(["report", str(result), "--output", str(other)]) for _ in range(2)] == [0, 0]
    assert oocattn.open(result).report.to_html(other) == other


def test_the_report_of_an_event_has_no_result_yet(dataset: Path, result: Path) -> None:
    ended: list[Any] = []
    carry_out(plan_for(dataset, chunks=3), dataset, result, callbacks=[lambda event: ended.append(event)])
    with pytest.raises(ProblemError, match="does not know its result"):
        ended[-1].report.to_html(result.with_name("page.html"))


def test_the_json_of_the_command_is_that_of_python(dataset: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    capsys.readouterr()
    kept = (state_of(result) / "full-report.json").stat().st_mtime_ns
    assert main(["report", str(result), "--json"]) == 0
    assert (state_of(result) / "full-report.json").stat().st_mtime_ns == kept
    printed = json.loads(capsys.readouterr().out)
    made = {"made": printed["made"]}  # the second in which each was made
    assert printed == {**oocattn.report(result).to_json(), **made}
    assert printed == {**json.loads((state_of(result) / "full-report.json").read_text()), **made}


def test_a_certificate_is_on_the_page(dataset: Path, result: Path) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    oocattn.verify(result, rows=4)
    report = oocattn.report(result)
    assert report.to_json()["status"]["certificate"] == "passed"
    assert re.search(r"T\S+: passed", page_text(report.page()))


def test_a_run_of_ten_thousand_subproblems_on_many_lanes_has_a_small_page(dataset: Path, fast_path: Path) -> None:
    run = run_of(fast_path, plan_for(dataset, chunks=3))
    log = AttemptLog(run)
    log(make_event("started", 100.0, 100.0, plan=run.plan, left=run.plan.subproblems))
    for number in range(10_000):
        start = 100 + number / 10
        spans = tuple(Span(name, start, start + 0.07 + number % 3 / 20) for name in ("read", "compute", "save"))
        given = {"worker": str(number % 16), "spans": spans, "memory": Memory(f"host {number % 16}", number, number)}
        log(make_event("attended", start, start + 0.1, pairs=number, partial_bytes=5, **given))
    log(make_event("failed", 1100.0, 1100.0, error="enough"))
    found = read_attempts(run.paths)
    assert found is not None
    (attempt,) = found.attempts
    assert (attempt.subproblems, attempt.pairs, attempt.lanes) == (10_000, sum(range(10_000)), 16)
    assert attempt.over_time is not None
    assert sum(attempt.over_time.rates["pairs"]) * attempt.over_time.width == pytest.approx(attempt.pairs, rel=0.02)
    restless = [7 * number % 100 for number in range(MOST_BINS)]
    rows = tuple(
        BusyRow(f"lane {number}", "copy out", 1.0, "".join(f"{each:02}" for each in restless)) for number in range(MOST_ROWS)
    )
    names = ("pairs", "read", "written", "saved")
    busiest = replace(attempt.over_time, rates=dict.fromkeys(names, tuple(map(float, restless))), busy=rows)
    for _ in range(2 * MOST_ATTEMPTS):
        found = found.adding(replace(attempt, words="x" * 500, log=attempt.log * 50, over_time=busiest))
    assert (len(found.attempts), found.left_out) == (MOST_ATTEMPTS, MOST_ATTEMPTS + 1)
    assert sum(each.over_time is not None for each in found.attempts) == MOST_DETAILED
    assert from_json(Attempts, json.loads(found.text())) == found
    assert len(found.text()) < 1 << 20
    (run.paths.state / "attempts.json").write_text(found.text())
    report = oocattn.report(run.paths.folder)
    assert f"\nattempt {MOST_ATTEMPTS + found.left_out}  " in str(report)
    assert len(report.page()) < 1 << 20


def test_a_text_that_is_too_long_for_the_record_shows_that_it_was_cut(dataset: Path) -> None:
    plan = plan_for(dataset, chunks=3)
    found = Planned.of(plan, "d" * 3000, "c" * MOST_TEXT)
    assert (len(found.dataset), found.dataset[-4:], found.command) == (MOST_TEXT, "d...", "c" * MOST_TEXT)


def test_the_page_of_another_result_is_removed_but_no_page_of_others(dataset: Path, result: Path) -> None:
    def stop(event: oocattn.Event) -> None:
        if event.kind == "started":
            raise KeyboardInterrupt

    carry_out(plan_for(dataset, chunks=3), dataset, result)
    shutil.rmtree(result)
    (state_of(result) / "full-report.json").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[stop])
    assert not (state_of(result) / "report.html").exists()
    assert (state_of(result) / "full-report.json").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_draws_the_page_and_says_more_on_hover(dataset: Path, result: Path, tmp_path: Path) -> None:
    carry_out(plan_for(dataset, chunks=13), dataset, result)
    page = oocattn.report(result).to_html(tmp_path / "page.html")
    hovered = (
        "(strip => { strip.dispatchEvent(new PointerEvent('pointermove', {clientX: strip.getBoundingClientRect().x + 5}));"
        "return /busy \\d+%/.test(tip.textContent) })(document.querySelector('svg.busy'))"
    )
    assert look_at(page.as_uri(), hovered, tmp_path / "page.png") == []
