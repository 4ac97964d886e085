"""Runs and workers that are killed at chosen moments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(
    ("victim", "moments", "chunks"),
    [
        ("run", 4, 13),
        ("worker", 2, 13),
        *(pytest.param(victim, 40, 31, marks=pytest.mark.slow) for victim in ("run", "worker")),
    ],
)
def test_killed_runs_and_workers_give_the_same_bits(partials: str, victim: str, moments: int, chunks: int) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker, from the first to the last."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), "--moments", str(moments), "--chunks", str(chunks)]
    command += ["--partials", partials, "--grace", "10", *(["--workers"] if victim == "worker" else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), str(script.parent)])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{moments} of {moments} bit-identical" in ended.stdout
