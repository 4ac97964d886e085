"""Fixtures of the tests of lanes: lanes that are closed, and datasets for whole runs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from cuda_datasets import BUDGETS, TOKENS, Datasets
from support import MakeLane, normal_arrays, run_of, write_dataset

import oocattn
from oocattn import Plan
from oocattn.pipelines.lane.lane import Lane


@pytest.fixture
def make_lane(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLane]:
    """Makes a lane on `fast_path`/dataset.zarr; it is closed before its folder goes: its threads may still write there."""
    with ExitStack() as lanes:

        def make(plan: Plan, result: str = "result.zarr") -> Lane:
            device = "cpu" if plan.device == "cpu" else "cuda:0"
            return lanes.enter_context(closing(Lane(run_of(fast_path, plan, result), device)))

        yield make


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    """Makes the dataset of these sizes, once."""
    made: dict[str, Path] = {}

    def make(tokens: int = TOKENS, *, storage: dict[str, Any] | None = None, **sizes: Any) -> Path:
        name = str((tokens, storage, sizes))
        if name not in made:
            folder = tmp_path_factory.mktemp("datasets")
            made[name] = write_dataset(
                folder / "dataset.zarr", normal_arrays(tokens, **sizes), min(tokens, 1 << 16), **storage or {}
            )
        return made[name]

    return make


@pytest.fixture
def half(datasets: Datasets) -> Path:
    """Two heads of 64 float16 dimensions: what most tests run on."""
    return datasets(heads=2, kv_heads=2, head_dim=64, dtype="float16")


@pytest.fixture
def half_plan(half: Path) -> Plan:
    """Causal, seven chunks, cuDNN."""
    return oocattn.plan(half, causal=True, chunks=7, decomposition="cqs", kernel="cudnn", **BUDGETS)
