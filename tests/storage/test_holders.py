"""Whether the process that holds a lock has ended: what this kernel tells, and what nobody here can know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, serving_s3

import oocattn
from oocattn.storage.journal.claims import Holder, parse_holder
from oocattn.storage.journal.lock import lock_holder

PRINT = "import json, dataclasses as d; from oocattn.storage.journal.claims import Holder as H"
HOLD = f"{PRINT}; print(json.dumps(d.asdict(H.this_process())), flush=True); input()"

RUN = """
import json, os, signal, sys
import oocattn

def kill(event):
    if event.kind == "attended":
        os.kill(os.getpid(), sig)

dataset, result, scratch, options, sig = sys.argv[1:5] + [int(sys.argv[5])]
oocattn.attention(
    dataset, result, scratch=scratch, storage_options=json.loads(options), engine="inline", kernel="cpu", chunks=3,
    callbacks=[kill],
)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the kernel tells nothing of processes")


@pytest.fixture
def other() -> Iterator[tuple[Holder, subprocess.Popen[str]]]:
    """A process that could hold a lock."""
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield parse_holder(process.stdout.readline().encode()), process
        process.kill()


def test_the_kernel_tells_when_a_process_has_ended(other: tuple[Holder, subprocess.Popen[str]]) -> None:
    holder, process = other
    assert not holder.has_ended
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent does not know yet
    assert holder.has_ended
    process.wait()
    assert holder.has_ended


def test_a_number_that_another_process_has_now_is_not_the_holder() -> None:
    here = Holder.this_process()
    assert not here.has_ended
    assert replace(here, started=here.started - 1).has_ended


@pytest.mark.parametrize("unknown", [{"kernel": "b"}, {"kernel": ""}, {"pids": "b"}, {"pids": ""}, {"started": 0}])
def test_of_another_kernel_or_container_nothing_is_known(
    other: tuple[Holder, subprocess.Popen[str]], unknown: dict[str, Any]
) -> None:
    holder, process = other
    process.kill()
    process.wait()
    assert holder.has_ended
    assert not replace(holder, **unknown).has_ended


def test_a_process_that_is_hidden_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, read = Holder.this_process(), Path.read_bytes

    def hide(path: Path) -> bytes:
        if path == Path(f"/proc/{holder.process}/stat"):
            raise FileNotFoundError(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", hide)
    assert not holder.has_ended


def test_a_lock_file_that_was_touched_a_moment_ago_by_a_process_that_has_ended_is_stale(tmp_path: Path) -> None:
    here = replace(Holder.this_process(), flocked=False)
    for holder, expected in ((here, here), (replace(here, started=here.started - 1), None)):
        (tmp_path / "lock").write_text(json.dumps(asdict(holder)))
        assert lock_holder(tmp_path / "lock") == expected


@pytest.mark.parametrize("scratch", ["there", "store"])
def test_status_from_elsewhere_knows_that_a_run_of_this_host_has_died(
    dataset: Path, here: Path, scratch: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    with serving_s3() as options:
        url, given = f"s3://{BUCKET}/{scratch}.zarr", json.dumps(options)
        place = "store" if scratch == "store" else str(tmp_path / scratch)
        command = [sys.executable, "-c", RUN, str(dataset), url, place, given]
        seen = {"scratch": "store"} if scratch == "store" else {}
        stopped = subprocess.Popen([*command, str(signal.SIGSTOP.value)], env=environment, cwd=tmp_path)
        try:
            os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
            living = oocattn.status(url, storage_options=options, **seen)
        finally:
            stopped.kill()
            stopped.wait()
        assert (living.state, f"process {stopped.pid} on host" in living.holder) == ("running", True)
        died = oocattn.status(url, storage_options=options, **seen)
        assert (died.state, died.holder) == ("interrupted", "")
        assert f"--scratch {place}" in died.resume or f"scratch={place!r}" in died.resume
