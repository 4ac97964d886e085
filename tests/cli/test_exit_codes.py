"""Every exit code of the command is in the documentation, in --help, and is seen to come."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import oocattn
from oocattn.cli import main as cli
from oocattn.cli.exit_codes import EXIT_CODES

DOCS = Path(__file__).parents[2] / "docs"


def raise_error(error: Exception) -> None:
    raise error


def certified(outcome: str) -> SimpleNamespace:
    return SimpleNamespace(
        inconclusive=outcome == "inconclusive", passed=outcome == "passed", files=(), to_json=lambda: {"outcome": outcome}
    )


SEEN = {
    "done": (0, lambda: oocattn.Status("finished")),
    "a run that can go on": (0, lambda: oocattn.Status("interrupted", 4, 1)),
    "no run has begun": (1, lambda: oocattn.Status("none")),
    "the certificate of the result failed": (1, lambda: oocattn.Status("finished", certificate="failed")),
    "an error of ours": (1, lambda: raise_error(oocattn.ProblemError("no"))),
    "an error of the system": (1, lambda: raise_error(OSError("no"))),
    "no memory": (1, lambda: raise_error(MemoryError())),
    "the certificate passed": (0, lambda: certified("passed")),
    "the certificate is inconclusive": (3, lambda: certified("inconclusive")),
    "the certificate failed": (1, lambda: certified("failed")),
    "the time limit is reached": (75, lambda: raise_error(oocattn.TimeLimitError("late"))),
    "SIGUSR1": (75, lambda: signal.raise_signal(signal.SIGUSR1)),
    "SIGHUP": (129, lambda: signal.raise_signal(signal.SIGHUP)),
    "SIGINT": (130, lambda: signal.raise_signal(signal.SIGINT)),
    "SIGTERM": (143, lambda: signal.raise_signal(signal.SIGTERM)),
}
"""What ends a command, and its exit code; 2 is below."""


@pytest.mark.parametrize("json", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("ended", SEEN)
def test_a_command_ends_with_the_code_for_what_ended_it(
    ended: str, json: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, end = SEEN[ended]
    command = "verify" if "the certificate " in ended and "of the" not in ended else "status"
    monkeypatch.setattr(oocattn, command, lambda *_, **__: end())
    assert cli.main([command, "result.zarr", *json]) == code
    printed = capsys.readouterr()
    assert bool(printed.out) != bool(printed.err), "an outcome on standard output, or else a line on standard error"


@pytest.mark.parametrize("arguments", [[], ["status"], ["status", "a", "--jason"], ["plan", "a", "--chunks", "0", "--json"]])
def test_bad_usage_is_2_and_prints_nothing_on_standard_output(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)


def test_every_code_is_documented_and_seen() -> None:
    (section,) = re.findall(r"^## Exit codes\n(.*?)^## ", (DOCS / "command-line.md").read_text(), re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)
    documented = {int(code) for cell in cells for code in cell.split(", ")}
    assert documented == EXIT_CODES.keys() == {2, *(code for code, _ in SEEN.values())}


@pytest.mark.parametrize("command", [[], *([name] for name in cli._COMMANDS)], ids=str)
def test_help_lists_every_code(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert all(f"{code} {meaning}" in words for code, meaning in EXIT_CODES.items())
