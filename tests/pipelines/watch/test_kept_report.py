"""The report that is kept beside a result: the last word on its run, made again by `verify`, and never another's file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import FullReport
from oocattn.cli.main import main


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(130))


def state_of(result: Path) -> Path:
    return result.with_name(f"{result.name}.oocattn")


def test_verify_makes_the_report_again_with_its_certificate(dataset: Path, result: Path) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    page = state_of(result) / "report.html"
    assert "Not verified" in page.read_text()
    assert oocattn.verify(result, rows=4).passed
    assert ": passed" in page.read_text()
    assert "Not verified" not in page.read_text()
    assert json.loads((state_of(result) / "full-report.json").read_text())["status"]["certificate"] == "passed"


@pytest.mark.parametrize("mine", [None, "mine"])
def test_a_certificate_does_not_bring_back_or_replace_what_is_no_report_of_ours(
    dataset: Path, result: Path, mine: str | None
) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)
    page = state_of(result) / "report.html"
    page.unlink() if mine is None else page.write_text(mine)
    before = (state_of(result) / "full-report.json").read_text()
    assert oocattn.verify(result, rows=4).passed
    assert (page.read_text() if page.exists() else None) == mine
    assert (state_of(result) / "full-report.json").read_text() == before


def test_a_run_that_ends_while_its_report_is_written_has_the_last_word(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of the running run reaches the disk after that of the run itself."""
    early: list[FullReport] = []

    def look(event: oocattn.Event) -> None:
        if event.kind == "attended" and not early:
            early.append(oocattn.report(result))

    carry_out(plan_for(dataset, chunks=3), dataset, result, callbacks=[look])
    found = iter([*early, *[oocattn.report(result)] * 2])
    monkeypatch.setattr("oocattn.pipelines.watch.full_report.full_report", lambda paths: next(found))
    assert main(["report", str(result)]) == 0
    assert "finished in" in (state_of(result) / "report.html").read_text()
    assert json.loads((state_of(result) / "full-report.json").read_text())["status"]["state"] == "finished"


def test_a_page_that_cannot_lie_beside_its_result_is_written_elsewhere(
    dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    carry_out(plan_for(dataset, chunks=3), dataset, result)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(result))

    monkeypatch.setattr("oocattn.pipelines.watch.full_report.write_full_report", refuse)
    assert main(["report", str(result)]) == 1
    assert "--output FILE.html writes the page elsewhere" in capsys.readouterr().err
    assert main(["report", str(result), "--output", str(result.with_name("page.html"))]) == 0
    assert main(["report", str(result), "--json"]) == 0
