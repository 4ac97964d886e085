"""On a disk that fills up, a run stops with what it has committed, and goes on once there is room."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import BESIDE

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command where it may mount what it likes, and nobody else sees it."""

CASES = [(partials, kibibytes) for partials in ("memory", "disk") for kibibytes in (60, 160)]
"""Where partials are, and how large the disk is: too small for the first checkpoints, and for the last chunks."""


def can_mount(folder: Path) -> bool:
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """What `small_disk.py` prints of each case, all of which run in one process."""
    folder = tmp_path_factory.mktemp("small")
    if not can_mount(folder):
        pytest.skip("no file system can be mounted here")
    script = Path(__file__).with_name("small_disk.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    cases = [f"{partials}:{kibibytes}" for partials, kibibytes in CASES]
    command = [*NAMESPACE, sys.executable, str(script), str(folder), *cases]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return dict(zip(CASES, ended.stdout.split("=\n")[:-1], strict=True))


@pytest.mark.parametrize(("partials", "kibibytes"), CASES)
def test_a_run_on_a_small_disk_goes_on_once_there_is_room(
    said: dict[tuple[str, int], str], partials: str, kibibytes: int
) -> None:
    printed = said[partials, kibibytes]
    assert "failed: [Errno 28] no space left for the result and its partials; make room and resume" in printed
    assert re.search(r"^WARNING .*: the result takes 155 KiB and \d+ KiB is free on its disk: make room", printed)
    assert "left half written: 0" in printed
    assert "interrupted: " in printed
    assert f"beside it: {sorted(BESIDE)}" in printed
    assert printed.endswith("bit-identical\n")
