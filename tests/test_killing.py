"""Runs and workers that are killed at chosen moments."""

from __future__ import annotations

import killing
import pytest
from warm import WarmProcess


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (["--moments", "3", "--chunks", "7"], 6),
        (["--moments", "1", "--chunks", "13", "--workers"], 2),
        pytest.param(["--moments", "40"], 80, marks=pytest.mark.slow),
        pytest.param(["--moments", "40", "--workers"], 80, marks=pytest.mark.slow),
    ],
    ids=["runs", "workers", "runs at many moments", "workers at many moments"],
)
def test_killed_runs_and_workers_give_the_same_bits(options: list[str], kills: int) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker, with partials in memory and on disk."""
    process = WarmProcess(killing.main, [*options, "--partials", "memory", "disk", "--grace", "10"])
    printed, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, complaints
    assert f"{kills} of {kills} bit-identical" in printed
