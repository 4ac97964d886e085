"""Fixtures of tests of results in stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import carry_out, plan_for

import oocattn


@pytest.fixture
def plan(dataset: Path) -> oocattn.Plan:
    return plan_for(dataset, chunks=3, learnable_sink=[0.0, 1.0])


@pytest.fixture
def right(plan: oocattn.Plan, dataset: Path, fast_path: Path) -> oocattn.Result:
    return carry_out(plan, dataset, fast_path / "right.zarr")
