"""Learnable sinks that take nearly all of the weight: little is allowed, and rows without any other weight are 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn


@pytest.mark.parametrize("sink", [5.0, 20.0, 50.0])
def test_what_is_allowed_is_near_what_is_lost_whatever_a_sink_takes(fast_path: Path, sink: float) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(200, heads=2, head_dim=16))
    result = fast_path / "result.zarr"
    oocattn.attention(dataset, result, causal=True, learnable_sink=[sink, sink], engine="inline")
    certificate = oocattn.verify(result, rows=20, all_rows=True, engine="inline")
    assert certificate.passed
    assert all(row.shows and row.allowed < 1e-4 for row in certificate.rows)
    out = zarr.open_array(result / "out", mode="r+")
    out[0, 1, 77] = out[0, 1, 77] * np.float32(1.001)  # type: ignore[operator]
    certificate = oocattn.verify(result, rows=20, all_rows=True, checksums=False, engine="inline")
    assert [(row.head, row.token) for row in certificate.all_rows.wrong] == [(1, 77)]


@pytest.mark.parametrize("closed", [slice(None), slice(32)], ids=["all keys", "the first half"])
def test_rows_whose_keys_are_all_shut_beside_a_sink_are_zero(fast_path: Path, closed: slice) -> None:
    bias = np.zeros((1, 1, 64), np.float32)
    bias[..., closed] = -np.inf
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(64, heads=1, dtype="bfloat16"), key_bias=bias)
    oocattn.attention(dataset, fast_path / "result.zarr", causal=True, learnable_sink=[0.56], engine="inline")
    certificate = oocattn.verify(fast_path / "result.zarr", all_rows=True, engine="inline")
    assert certificate.passed
    assert all(row.shows for row in certificate.rows)
    out = zarr.open_array(fast_path / "result.zarr" / "out", mode="r+")
    out[0, 0, 3, 1] = 1e-3
    assert oocattn.verify(fast_path / "result.zarr", all_rows=True, checksums=False, engine="inline").failed
