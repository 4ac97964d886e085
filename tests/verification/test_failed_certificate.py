"""A result whose certificate failed says so wherever it is met, until it is computed again or verified with success."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, Plan
from oocattn.cli.main import main
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(64))


@pytest.fixture
def plan(dataset: Path) -> Plan:
    return plan_for(dataset, chunks=7)


@pytest.fixture
def result(dataset: Path, plan: Plan, fast_path: Path) -> Path:
    """A result with a damaged chunk, of which a certificate says so."""
    result = carry_out(plan, dataset, fast_path / "result.zarr").path
    flip_a_bit(result)
    assert oocattn.verify(result, rows=8).failed
    return result


def flip_a_bit(result: Path) -> None:
    """Another time: put it right."""
    chunk = min((result / "out").glob("c*"))
    content = chunk.read_bytes()
    chunk.write_bytes(bytes([content[0] ^ 0x40]) + content[1:])


def certificate_of(result: Path) -> Path:
    return ResultPaths.at(result).certificate


def test_status_says_that_it_failed_when_and_what_to_do(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = oocattn.status(result)
    made = json.loads(certificate_of(result).read_text())["made"]
    assert (status.state, status.certificate) == ("finished", "failed")
    assert str(status).splitlines()[1].startswith(f"certificate of {made}: FAILED: 1 of ")
    assert main(["status", str(result)]) == 1
    assert "compute it again with `oocattn run --overwrite`" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_command_that_runs_nothing_fails_and_says_why(
    dataset: Path, result: Path, command: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([command, *([str(dataset)] if command == "run" else []), str(result)]) == 1
    assert "nothing was run" in capsys.readouterr().out
    [warning] = [record.message for record in caplog.records]
    made = json.loads(certificate_of(result).read_text())["made"]
    assert warning.startswith(f"{result} is there, but its certificate of {made} says FAILED: 1 of ")
    assert "`oocattn run --overwrite`" in warning
    assert warning.endswith("`oocattn verify` checks it again")


def test_the_functions_warn(dataset: Path, result: Path, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    for again in (
        lambda: oocattn.attention(dataset, result),
        lambda: oocattn.resume(result),
        lambda: carry_out(plan, dataset, result),
    ):
        caplog.clear()
        assert again().path == result
        assert "its certificate of" in caplog.text


def assert_not_believed(dataset: Path, result: Path, certificate: str = "") -> None:
    """No command fails for a certificate."""
    assert oocattn.status(result).certificate == certificate
    assert main(["status", str(result)]) == 0
    assert main(["run", str(dataset), str(result)]) == 0


def test_computing_it_again_forgets_the_certificate(dataset: Path, result: Path, plan: Plan) -> None:
    carry_out(plan, dataset, result, overwrite=True)
    assert not certificate_of(result).exists()
    assert_not_believed(dataset, result)
    oocattn.verify(result, rows=8)
    assert_not_believed(dataset, result, "passed")
    assert ": passed" in str(oocattn.status(result))


def test_a_later_certificate_that_passed_takes_its_place(dataset: Path, result: Path) -> None:
    flip_a_bit(result)
    assert oocattn.verify(result, rows=8).passed
    assert_not_believed(dataset, result, "passed")


def test_an_interrupted_second_run_does_not_clear_it(dataset: Path, result: Path, plan: Plan) -> None:
    """The result that is there until the commit is still the wrong one."""

    def refuse(event: Event) -> None:
        if event.kind == "attended":
            raise SystemExit

    with pytest.raises(SystemExit):
        carry_out(plan, dataset, result, overwrite=True, callbacks=[refuse])
    assert oocattn.status(result).state == "interrupted"
    assert main(["run", str(dataset), str(result)]) == 1
    assert oocattn.resume(result, engine="inline").report.pairs > 0
    assert_not_believed(dataset, result)


@pytest.mark.parametrize("how", ["files were exchanged", "another digest", "another dataset"])
def test_the_certificate_of_another_result_is_not_believed(
    result: Path, fast_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, dataset = certificate_of(result), fast_path / "dataset.zarr"
    if how == "files were exchanged":  # the right result of another dataset, put in its place
        dataset = write_dataset(fast_path / "other.zarr", normal_arrays(64, seed=1))
        other = carry_out(plan_for(dataset, chunks=7), dataset, fast_path / "other-result.zarr").path
        result.rename(fast_path / "wrong.zarr")
        other.rename(result)
    else:
        name = "digest" if how == "another digest" else "dataset_recorded"
        certificate.write_text(json.dumps({**json.loads(certificate.read_text()), name: "0" * 64}))
    assert_not_believed(dataset, result)
    assert "certificate" not in caplog.text


def symlink(path: Path) -> None:
    path.symlink_to(path.with_name("report.json"))


DAMAGED: dict[str, Callable[[Path], object]] = {
    **{repr(text): lambda path, text=text: path.write_text(text) for text in ("", "{", "[]", "{}", '{"passed": false}')},
    "binary": lambda path: path.write_bytes(b"\xff\x00" * 100),
    "deep": lambda path: path.write_text("[" * 100_000),
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "link": symlink,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_certificate_is_a_warning(
    dataset: Path, result: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    certificate_of(result).unlink()
    damage(certificate_of(result))
    assert_not_believed(dataset, result)
    assert f"the certificate beside {result} cannot be read" in caplog.text
    assert "verify the result again" in caplog.text


@pytest.mark.parametrize("field", ["format", "passed", "digest", "made", "verdict", "problem"])
def test_a_certificate_with_a_damaged_field_is_a_warning(
    dataset: Path, result: Path, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads(certificate_of(result).read_text())
    for value in (7, [], {}, 1.5):
        certificate_of(result).write_text(json.dumps({**content, field: value}))
        assert_not_believed(dataset, result)
        assert "verify the result again" in caplog.text
        caplog.clear()


def test_a_result_that_was_moved_with_its_folder_keeps_its_certificate(result: Path, fast_path: Path) -> None:
    moved = fast_path / "moved.zarr"
    ResultPaths.at(result).state.rename(ResultPaths.at(moved).state)
    result.rename(moved)
    assert oocattn.status(moved).certificate == "failed"
