"""Runs and workers that are killed at chosen moments."""

from __future__ import annotations

import killing
import pytest
from warm import WarmProcess

MASKED = ("window", "documents")


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        (["--moments", "3", "--chunks", "7"], 6),
        (["--moments", "2", "--chunks", "7", "--mask", "window"], 4),
        (["--moments", "2", "--chunks", "7", "--mask", "documents"], 4),
        (["--moments", "1", "--chunks", "13", "--workers"], 2),
        (["--moments", "2", "--chunks", "7", "--all-rows", "--mask", "window"], 4),
        pytest.param(["--moments", "40"], 80, marks=pytest.mark.slow),
        *(pytest.param(["--moments", "50", "--mask", mask], 100, marks=pytest.mark.slow) for mask in MASKED),
        pytest.param(["--moments", "40", "--workers"], 80, marks=pytest.mark.slow),
        pytest.param(["--moments", "25", "--chunks", "7", "--store", "--inline"], 50, marks=pytest.mark.slow),
        pytest.param(["--moments", "25", "--all-rows", "--mask", "documents"], 50, marks=pytest.mark.slow),
    ],
    ids=[
        *("runs", "runs with a window", "runs with documents", "workers"),
        *("second passes", "runs at many moments"),
        *(f"runs with {mask} at many moments" for mask in MASKED),
        "workers at many moments",
        "runs to a store at many moments",
        "second passes at many moments",
    ],
)
def test_killed_runs_and_workers_give_the_same_bits(options: list[str], kills: int) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker, with partials in memory and on disk."""
    if "--store" in options:
        pytest.importorskip("moto.server")
    process = WarmProcess(killing.main, [*options, "--partials", "memory", "disk", "--grace", "10"])
    printed, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, complaints
    assert f"{kills} of {kills} bit-identical" in printed
