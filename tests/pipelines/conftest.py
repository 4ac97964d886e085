"""Results that tests of surveys begin with, of the `dataset` that a module of tests gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from passes import copied

import oocattn


@pytest.fixture(scope="module")
def first(dataset: Path, shared_path: Path) -> Path:
    """A result without a survey; not to be changed."""
    oocattn.attention(dataset, shared_path / "first.zarr", causal=True, engine="inline")
    return shared_path / "first.zarr"


@pytest.fixture
def result(first: Path, fast_path: Path) -> Path:
    return copied(first, fast_path / "result.zarr")
