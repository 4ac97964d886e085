"""Whatever becomes of standard output and error, a committed result is exit code 0; what only prints has failed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from support import GENEROUS, MACHINE, a_problem, normal_arrays, write_dataset

import oocattn
from oocattn.cli import main as cli
from oocattn.cli import printing
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data") / "dätaset.zarr", normal_arrays(40)))


def broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", closefd=False)


def full_disk() -> TextIO:
    return open(os.open("/dev/full", os.O_WRONLY), "w", closefd=False)


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


BROKEN = [broken_pipe, full_disk, closed, lambda: None]
IDS = ["broken pipe", "full disk", "closed", "none"]


@pytest.mark.parametrize("make", BROKEN, ids=IDS)
def test_a_run_is_done_whether_or_not_its_output_can_be_written(
    dataset: str, result: Path, make: Callable[[], TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", make())
        patched.setattr(sys, "stderr", make())
        assert cli.main(["run", dataset, str(result), "--chunks", "7", "--progress"]) == 0
    assert oocattn.verify(result, rows=4).passed


@pytest.mark.parametrize("make", BROKEN, ids=IDS)
def test_a_command_that_only_prints_has_failed_then(
    dataset: str,
    result: Path,
    make: Callable[[], TextIO],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(oocattn, "status", lambda _, **__: oocattn.Status("finished", seconds=1.0))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", make())
        assert cli.main(["status", str(result)]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == (0 if make is broken_pipe else 1)
    assert all(line.startswith("oocattn: standard output cannot be written: ") for line in printed)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]], ids=" ".join)
@pytest.mark.parametrize("make", BROKEN, ids=IDS)
def test_help_that_cannot_be_printed_is_a_failure_unless_its_reader_left(
    arguments: list[str],
    make: Callable[[], TextIO],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", make())
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    printed = capsys.readouterr().err.splitlines()
    left = make is broken_pipe
    assert (ended.value.code, len(printed)) == ((0, 0) if left else (1, 1))
    assert all(line.startswith("oocattn: standard output cannot be written: ") for line in printed)


def test_a_stream_of_the_caller_need_only_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(oocattn, "status", lambda _, **__: oocattn.Status("finished", seconds=1.0))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", SimpleNamespace(write=written.append))
        patched.setattr(sys, "stderr", SimpleNamespace(write=written.append))
        assert cli.main(["status", "nowhere"]) == 0
    assert "".join(written) == "finished in 1 s\n"


def test_a_stream_of_the_caller_may_raise_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(oocattn, "status", lambda _, **__: oocattn.Status("finished", seconds=1.0))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", SimpleNamespace(write=refuse))
        patched.setattr(sys, "stderr", SimpleNamespace(write=refuse))
        assert cli.main(["status", "nowhere"]) == 1


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(written := io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(oocattn, "status", lambda _, **__: oocattn.Status("running", holder="hüst"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert cli.main(["status", "nowhere"]) == 0
    assert written.getvalue() == b"running: starting; h\\xfcst\n"


def test_what_holds_names_from_elsewhere_is_fit_to_print() -> None:
    name = "a\x1b[2J\nforged"
    a_plan = make_plan(a_problem(1000), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)
    texts = [
        str(oocattn.Status("running", 10, holder=name, dashboard=name, error=name)),
        str(oocattn.Status("running", holder=name)),
        str(oocattn.ResultExistsError(name)),
        str(oocattn.TaskError(name, name)),
        str(replace(a_plan, inputs=InputCost(notes=(name,)))),
    ]
    for text in texts:
        assert r"a\x1b[2J\nforged" in text
        assert "\x1b" not in text
        assert not any(line.startswith("forged") for line in text.splitlines())


def process(arguments: list[str], shell: str) -> Any:
    """A command in a process of its own, with the shell's redirections."""
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    command = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-m", "oocattn", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_ends_with_its_code_and_without_a_traceback(dataset: str, fast_path: Path) -> None:
    """The interpreter flushes once more as it ends, and files must not get the descriptors of closed streams."""
    ended = process(["run", dataset, str(fast_path / "closed.zarr"), "--chunks", "7"], ">&- 2>&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert oocattn.verify(fast_path / "closed.zarr", rows=4).passed
    ended = process(["run", dataset, str(fast_path / "full.zarr"), "--chunks", "7"], "> /dev/full")
    said = "oocattn: standard output cannot be written: [Errno 28] No space left on device\n"
    assert (ended.returncode, ended.stderr) == (0, said)
    ended = process(["status", str(fast_path / "full.zarr")], "| true; exit ${PIPESTATUS[0]}")
    assert (ended.returncode, ended.stderr) == (1, "")


def test_no_file_gets_the_descriptor_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    script = (
        f"import os, runpy; runpy.run_path({printing.__file__!r})['keep_descriptors_taken'](); "
        f"os.write(descriptor := os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY), str(descriptor).encode())"
    )
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", script], check=True)
    assert int((tmp_path / "file").read_text()) > 2
