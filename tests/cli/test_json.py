"""With --json a command prints one document on standard output, which is what `to_json` gives, and nothing else there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import GENEROUS, MACHINE, a_problem

import oocattn
from oocattn.bench import Ceiling, Progress, Row, Table
from oocattn.cli import main as cli
from oocattn.cli.doctor import Check
from oocattn.planning.candidates import make_plan

PAGE = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text()


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with --json: its exit code, its document (None: nothing was printed), standard error."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = cli.main([*arguments, "--json"])
        out, error = capsys.readouterr()
        assert len(out.splitlines()) <= 1
        return code, json.loads(out, parse_constant=refuse_constant) if out else None, error

    return run


def documented(heading: str) -> set[str]:
    """The keys that a section of docs/scripts.md names."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, heading
    return {key for cell in re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE) for key in re.findall(r"`(\w+)`", cell)}


def test_from_synth_to_status(tmp_path, monkeypatch, run_json) -> None:
    monkeypatch.chdir(tmp_path)
    kept: dict[str, Any] = {}

    def keep(name: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        kept[name] = function(*given, **options)
        return kept[name]

    for name in ("plan", "attention", "verify", "survey"):
        monkeypatch.setattr(oocattn, name, partial(keep, name, getattr(oocattn, name)))
    shape = ["--tokens", "64", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--dtype", "bfloat16"]
    code, made, _ = run_json("synth", "qkv.zarr", *shape)
    assert (code, made["dataset"]) == (0, str(tmp_path / "qkv.zarr"))
    assert made["arrays"]["k"] == {"shape": [1, 1, 64, 8], "dtype": "bfloat16"}
    assert run_json("plan", "qkv.zarr", "--causal") == (0, kept["plan"].to_json(), "")
    code, none, error = run_json("status", "out.zarr")
    assert (code, none["state"], none["share"], error) == (1, "none", 0.0, "")
    code, result, error = run_json("run", "qkv.zarr", "out.zarr", "--causal", "--engine", "inline")
    assert (code, result, error) == (0, kept["attention"].to_json(), "")
    assert result["path"] == str(tmp_path / "out.zarr")
    assert result["out"] == {"shape": [1, 2, 64, 8], "dtype": "bfloat16", "chunks": [1, 1, 64, 8]}
    assert result["report"]["pairs"] == 2 * 64 * 65 // 2
    assert result["plan"].keys() == documented("plan")
    assert result["plan"]["seconds"] == result["report"]["predicted_seconds"]
    assert json.loads((tmp_path / "out.zarr.oocattn" / "report.json").read_text()) == result["report"]
    assert run_json("verify", "out.zarr", "--rows", "4") == (0, kept["verify"].to_json(), "")
    assert run_json("survey", "out.zarr", "--pool", "8") == (0, kept["survey"].to_json(), "")
    code, status, _ = run_json("status", "out.zarr")
    assert (code, status) == (0, oocattn.status("out.zarr").to_json())
    assert (status["state"], status["share"], status["certificate"]) == ("finished", 1.0, "passed")
    code, again, error = run_json("run", "qkv.zarr", "out.zarr", "--causal", "--engine", "inline")
    assert code == 0
    assert again["report"] == result["report"]
    assert again["plan"] is None
    assert again["certificate"]["outcome"] == "passed"
    assert error.count("nothing was run") == len(error.splitlines()) == 1
    assert made.keys() == documented("synth and import")
    assert kept["plan"].to_json().keys() == documented("plan")
    assert result.keys() == documented("run and resume")
    assert result["report"].keys() == documented("RunReport")
    assert status.keys() == documented("status")
    assert kept["verify"].to_json().keys() == documented("verify")
    assert kept["survey"].to_json().keys() == documented("survey")


def test_import_describes_the_dataset(tmp_path, run_json) -> None:
    files = []
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", np.ones((3, 20, 8), np.float32))
        files += [f"--{name}", str(tmp_path / f"{name}.npy")]
    code, made, _ = run_json("import", str(tmp_path / "qkv.zarr"), *files, "--layout", "hnd")
    assert (code, made["arrays"]["v"]) == (0, {"shape": [1, 3, 20, 8], "dtype": "float32"})


def test_doctor(monkeypatch, run_json) -> None:
    checks = [Check("disk", True, "as found"), Check("python", False, "3")]
    monkeypatch.setattr("oocattn.cli.doctor.examine", lambda: iter(checks))
    code, found, error = run_json("doctor")
    assert (code, error) == (1, "")
    assert found["passed"] is False
    assert found["checks"] == [vars(check) for check in checks]
    assert found.keys() == documented("doctor")


def test_bench_prints_its_progress_on_standard_error(monkeypatch, run_json) -> None:
    """A way that could not run has an infinite median, which JSON lacks."""
    a_plan = make_plan(a_problem(1000), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)
    table = Table(a_plan.problem, (Row("resident call", note="no GPU"), Row("oocattn, page cache", (3.0, 1.0, 2.0))), ())
    records = [a_plan, Ceiling("disk", 2e9, "B/s"), Progress("wrote the dataset", 1.5), table]
    monkeypatch.setattr("oocattn.bench.bench", lambda folder, **options: (record for record in records))
    code, found, error = run_json("bench")
    assert code == 0
    assert found == table.to_json()
    assert [row["median"] for row in found["rows"]] == ["inf", 2.0]
    assert found["reference"] == "oocattn, page cache"
    assert error.splitlines()[-2:] == [str(records[1]), str(records[2])]
    assert found.keys() == documented("bench")


FAILING = {
    "synth": "qkv.zarr --tokens 8 --heads 3 --kv-heads 2 --head-dim 8 --dtype float32",
    "import": "qkv.zarr --q none.npy --k none.npy --v none.npy",
    "plan": "none.zarr",
    "run": "none.zarr out.zarr",
    "resume": "none.zarr",
    "report": "none.zarr",
    "status": "none.zarr",
    "verify": "none.zarr",
    "survey": "none.zarr",
    "doctor": "",
    "bench": "--heads 3 --kv-heads 2",
}
"""Arguments with which a command fails; `doctor` and `status` have the disk refuse."""


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_an_error_is_a_line_on_standard_error_and_no_document(command, here, run_json, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk refuses")

    monkeypatch.setattr("oocattn.cli.doctor.examine", refuse)
    monkeypatch.setattr("oocattn.pipelines.watch.status.seen_from_here", refuse)
    code, document, error = run_json(command, *FAILING[command].split())
    assert (code, document) == (1, None)
    assert re.fullmatch(r"oocattn: .*\n", error)
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_bad_usage_prints_nothing_on_standard_output(command, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *FAILING[command].split(), "--json", "--no-such-option"])
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_progress_goes_to_standard_error(dataset, result, run_json) -> None:
    code, found, error = run_json("run", str(dataset), str(result), "--engine", "inline", "--progress")
    assert (code, found["report"]["tokens"]) == (0, 1024)
    assert "subproblem" in error


def test_budgets_are_rows_of_documented_keys(run_json) -> None:
    shape = "--tokens 64K --heads 1 --head-dim 64 --dtype float16 --device l4 --budgets"
    code, found, _ = run_json("plan", *shape.split())
    assert code == 0
    assert len(found["budgets"]) == 20
    for row in found["budgets"]:
        assert row.keys() == {"host_memory", "devices", "seconds", "read", "scratch_disk", "binds"}
        assert all(f"`{key}`" in PAGE for key in row)


def test_what_others_print_does_not_come_between(monkeypatch, run_json) -> None:
    """As a plugin of a file system may; and characters that a terminal lacks stay JSON."""

    def status(*_: Any, **__: Any) -> oocattn.Status:
        print("from elsewhere")
        return oocattn.Status("interrupted", 4, 1, error="\udce9\x1b[2J\u202e\n", result="é.zarr")

    monkeypatch.setattr(oocattn, "status", status)
    code, document, error = run_json("status", "é.zarr")
    assert (code, error) == (0, "from elsewhere\n")
    assert document == status().to_json()
    assert document["share"] == 0.25


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_takes_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--json " in capsys.readouterr().out
