"""On a disk that fills up, a run stops with what it has committed, and goes on once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command where it may mount what it likes, and nobody else sees it."""


def can_mount(folder: Path) -> bool:
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("kibibytes", [80, pytest.param(160, marks=pytest.mark.slow), 300])
def test_a_run_on_a_small_disk_goes_on_once_there_is_room(tmp_path: Path, partials: str, kibibytes: int) -> None:
    if not can_mount(tmp_path):
        pytest.skip("no file system can be mounted here")
    script = Path(__file__).with_name("small_disk.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    command = [*NAMESPACE, sys.executable, str(script), str(tmp_path), partials, str(kibibytes)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "failed: [Errno 28] no space left for the result and its partials; make room and resume" in ended.stdout
    assert "left half written: 0" in ended.stdout
    assert "interrupted: " in ended.stdout
    assert "beside it: ['report.json']" in ended.stdout
    assert ended.stdout.endswith("bit-identical\n")
