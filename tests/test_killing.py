"""Runs and workers that are killed at chosen moments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (["--moments", "3", "--chunks", "13"], 6),
        (["--moments", "1", "--chunks", "13", "--workers"], 2),
        pytest.param(["--moments", "40"], 80, marks=pytest.mark.slow),
        pytest.param(["--moments", "40", "--workers"], 80, marks=pytest.mark.slow),
    ],
    ids=["runs", "workers", "runs at many moments", "workers at many moments"],
)
def test_killed_runs_and_workers_give_the_same_bits(options: list[str], kills: int) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker, with partials in memory and on disk."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), *options, "--partials", "memory", "disk", "--grace", "10"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{kills} of {kills} bit-identical" in ended.stdout
