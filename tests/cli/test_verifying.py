"""The command `verify --all-rows`: what it prints of its second pass."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import normal_arrays, write_dataset

import oocattn
from oocattn.cli.main import main
from oocattn.verification import certify as certifying

ALL_ROWS = ["--all-rows", "--rows", "4", "--engine", "inline", "--no-progress"]


@pytest.fixture
def result(fast_path: Path) -> str:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(60, heads=2, kv_heads=2))
    oocattn.attention(dataset, fast_path / "out.zarr", causal=True, engine="inline")
    return str(fast_path / "out.zarr")


def test_the_plan_of_the_pass_comes_first_and_then_what_it_all_took(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", result, *ALL_ROWS]) == 0
    plan, _, rest = capsys.readouterr().out.partition("\n\n")
    assert "second pass  over the pairs of a result" in plan
    found = (
        r"predicted .*\n\ntime         .* s, of which the pass took .* s \(predicted .* s\) and what came after it .* s\n"
    )
    assert re.search(found + "certificate  ", f"{plan}\n\n{rest.partition('problem')[0]}")


def test_a_pass_that_was_done_before_has_no_time(
    result: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(certifying, "check_all_rows", fail)
        assert main(["verify", result, *ALL_ROWS]) == 1
    capsys.readouterr()
    assert main(["verify", result, *ALL_ROWS]) == 0
    assert re.match(r"time         .* s; the pass was done before\ncertificate  ", capsys.readouterr().out)


def test_one_document_is_all_that_is_printed(result: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", result, *ALL_ROWS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all_rows"]["rows"] == 120
    assert main(["verify", result, "--rows", "4"]) == 0
    assert not re.search(r"^time ", capsys.readouterr().out, re.MULTILINE)
