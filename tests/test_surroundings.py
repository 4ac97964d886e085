"""A process may lack a home, a current folder, standard streams, or a name in UTF-8: a run goes on all the same."""

from __future__ import annotations

import os
import pty
import pwd
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from support import assert_same_bits, normal_arrays, write_dataset

import oocattn
from oocattn import ProblemError
from oocattn.cli import main as cli
from oocattn.imports import in_some_folder, with_some_home
from oocattn.pipelines.existing import open_result
from oocattn.storage.files.outputs import check_output

SOURCE = str(Path(oocattn.__file__).parents[1])


@pytest.fixture
def no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder that was removed."""
    (tmp_path / "removed").mkdir()
    monkeypatch.chdir(tmp_path / "removed")
    (tmp_path / "removed").rmdir()


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder and without an entry in the list of users."""

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_has_an_empty_one_while_libraries_are_imported(no_home: None) -> None:
    with with_some_home():
        assert not (Path.home() / ".bokeh" / "bokeh.yaml").exists()
    assert "HOME" not in os.environ


def test_a_home_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    with with_some_home():
        assert Path.home() == Path("/nowhere/at/all")
    assert os.environ["HOME"] == "/nowhere/at/all"


def test_a_removed_current_folder_is_left_for_a_while_only(no_folder: None) -> None:
    with in_some_folder():
        assert os.getcwd() == "/"
    with pytest.raises(FileNotFoundError):
        os.getcwd()


def test_a_relative_path_is_refused_where_the_current_folder_was_removed(no_folder: None) -> None:
    for call in (oocattn.plan, oocattn.status, oocattn.resume):
        with pytest.raises(ProblemError, match=r"x\.zarr: the current folder was removed: change to one that is there"):
            call("x.zarr")
    with pytest.raises(ProblemError, match="its folder does not exist"):
        check_output(Path("plan.svg"))


def test_a_process_without_home_current_folder_streams_and_utf_8(fast_path: Path) -> None:
    """As in a container whose user is only a number: what a process begins with is found as libraries are imported."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(130))
    result = fast_path / os.fsdecode(b"r\xff\xe9.zarr")
    plain = oocattn.attention(dataset, fast_path / "plain.zarr", chunks=7)
    script = f"""
import os, pwd
def unknown(_): raise KeyError("uid not found")
pwd.getpwuid = unknown
os.environ.pop("HOME", None)
os.mkdir({str(fast_path / "gone")!r}); os.chdir({str(fast_path / "gone")!r}); os.rmdir({str(fast_path / "gone")!r})
import sys
sys.argv[1:] = ["run", {str(dataset)!r}, os.fsdecode({os.fsencode(result)!r}), "--chunks", "7", "--progress"]
from oocattn.__main__ import run
raise SystemExit(run())
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE, "LC_ALL": "C", "COLUMNS": "1", "TERM": "dumb"}
    environment |= {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict", "PYTHONWARNINGS": "error"}
    ended = subprocess.run(
        ["bash", "-c", 'umask 077; ulimit -n 64; "$@" <&- >&-', "bash", sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert_same_bits(open_result(result), plain)


def test_names_that_are_no_utf_8_go_through_every_command(fast_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, result, drawing, timeline = (
        str(fast_path / os.fsdecode(name)) for name in (b"d\xff.zarr", b"r\xe9.zarr", b"p\xfe.svg", b"t\xfd.json")
    )
    shape = ["--tokens", "1K", "--heads", "1", "--head-dim", "16", "--dtype", "float32"]
    for command in (
        ["synth", dataset, *shape],
        ["plan", dataset, "--draw", drawing],
        ["run", dataset, result, "--chunks", "3", "--timeline", timeline],
        ["status", result],
        ["verify", result, "--rows", "4"],
        ["resume", result],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert r"d\udcff.zarr" in printed
    assert printed.encode("utf-8")
    page = (Path(result + ".oocattn") / "certificate.html").read_text(encoding="utf-8")
    assert r"r\udce9.zarr" in page
    assert cli.main(["run", dataset, result, "--causal"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_ctrl_c_says_begins_on_a_line_of_its_own(fast_path: Path) -> None:
    """In a terminal, where the progress bar is on the line."""
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(24_000, heads=4, head_dim=64))
    command = [sys.executable, "-m", "oocattn", "run", str(dataset), str(fast_path / "result.zarr"), "--chunks", "31"]
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 100))
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": SOURCE}, **streams) as process:
        os.close(terminal)
        shown, pressed = b"", False
        with suppress(OSError):  # which says that it has ended
            while True:
                shown += os.read(ours, 65536)
                if not pressed and b"%|" in shown:
                    process.send_signal(signal.SIGINT)
                    pressed = True
    os.close(ours)
    assert process.returncode == 130, shown
    lines = [line.rpartition("\r")[2] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if re.match("ending: what is in flight is finished", line)], shown
    assert lines[-2].startswith("oocattn: interrupted; go on with: oocattn resume")
