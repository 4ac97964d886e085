"""Runs and workers that are killed at chosen moments."""

from __future__ import annotations

import killing
import pytest
from warm import WarmProcess

MASKED = ("window", "documents")

BOTH = ["memory", "disk"]
"""Places of partials."""


@pytest.mark.parametrize(
    ("options", "places", "kills"),
    [
        (["--moments", "3", "--chunks", "7"], BOTH, 6),
        (["--moments", "2", "--chunks", "7", "--mask", "window"], ["memory"], 2),
        (["--moments", "2", "--chunks", "7", "--mask", "documents"], ["disk"], 2),
        (["--moments", "1", "--chunks", "13", "--workers"], BOTH, 2),
        (["--moments", "1", "--chunks", "7", "--all-rows", "--mask", "window"], BOTH, 2),
        (["--moments", "1", "--chunks", "7", "--survey"], BOTH, 2),
        pytest.param(["--moments", "40"], BOTH, 80, marks=pytest.mark.slow),
        *(pytest.param(["--moments", "50", "--mask", mask], BOTH, 100, marks=pytest.mark.slow) for mask in MASKED),
        pytest.param(["--moments", "40", "--workers"], BOTH, 80, marks=pytest.mark.slow),
        pytest.param(["--moments", "25", "--chunks", "7", "--store", "--inline"], BOTH, 50, marks=pytest.mark.slow),
        pytest.param(["--moments", "25", "--all-rows", "--mask", "documents"], BOTH, 50, marks=pytest.mark.slow),
        pytest.param(["--moments", "25", "--survey", "--mask", "window"], BOTH, 50, marks=pytest.mark.slow),
        pytest.param(["--moments", "50", "--survey", "--overwrite"], ["disk"], 50, marks=pytest.mark.slow),
    ],
    ids=[
        *("runs", "runs with a window", "runs with documents", "workers"),
        *("second passes", "surveys", "runs at many moments"),
        *(f"runs with {mask} at many moments" for mask in MASKED),
        "workers at many moments",
        "runs to a store at many moments",
        "second passes at many moments",
        *("surveys at many moments", "surveys that replace others at many moments"),
    ],
)
def test_killed_runs_and_workers_give_the_same_bits(options: list[str], places: list[str], kills: int) -> None:
    """A few of the moments at which `tests/killing.py` can kill a run or a worker, with partials in memory and on disk."""
    if "--store" in options:
        pytest.importorskip("moto.server")
    process = WarmProcess(killing.main, [*options, "--partials", *places, "--grace", "10"])
    printed, complaints = process.communicate(timeout=500)
    assert process.returncode == 0, complaints
    assert f"{kills} of {kills} bit-identical" in printed
