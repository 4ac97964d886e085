"""What others make of a result: dimensions with names, consolidated metadata, Dask, xarray and torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from support import sizes_of

import oocattn


def make_inputs(dtype: torch.dtype = torch.float32, keys: int = 40, value_dim: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (2, 4, 40, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, value_dim)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def compute(
    path: Path, dtype: torch.dtype = torch.float32, keys: int = 40, value_dim: int = 8, **asked: Any
) -> oocattn.Result:
    tensors = make_inputs(dtype, keys, value_dim)
    return oocattn.attention(tensors, path / "result.zarr", kernel="cpu", engine="inline", **asked)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, "batch query_head token head_dim"),
        ({"keys": 30}, "batch query_head query_token head_dim"),
        ({"value_dim": 16, "queries": (8, 40)}, "batch query_head asked_token value_dim"),
        ({"heads": [1, 2], "alibi_slopes": [1, 2, 3, 4]}, "batch asked_query_head token head_dim"),
        ({"cu_seqlens_q": [0, 9, 40], "learnable_sink": [1, 2, 3, 4]}, "batch query_head token head_dim"),
    ],
)
def test_every_array_of_a_result_has_named_dimensions_of_one_length(
    fast_path: Path, asked: dict[str, Any], names: str
) -> None:
    result = compute(fast_path, **asked)
    assert result.out.metadata.dimension_names == tuple(names.split())
    assert result.lse.metadata.dimension_names == tuple(names.split()[:3])
    assert sizes_of(result.path).items() >= dict(zip(names.split(), result.out.shape, strict=True)).items()


def test_a_result_has_the_consolidated_metadata_that_zarr_would_write(fast_path: Path) -> None:
    result = compute(fast_path, seqused_k=[20, 40])
    written = json.loads((result.path / "zarr.json").read_text())
    assert set(written["consolidated_metadata"]["metadata"]) == {"out", "lse", "seqused_k"}
    with pytest.warns(UserWarning, match="Consolidated metadata"):
        zarr.consolidate_metadata(result.path)
    assert json.loads((result.path / "zarr.json").read_text()) == written
    assert zarr.open_consolidated(result.path)["out"].attrs["checksums"]["algorithm"] == "crc32"
    assert oocattn.verify(result.path, inputs=make_inputs()).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_becomes_arrays_of_dask_xarray_and_torch(fast_path: Path, dtype: torch.dtype) -> None:
    xarray = pytest.importorskip("xarray")
    result = compute(fast_path, dtype, seqused_k=[20, 40])
    assert {name: array.shape for name, array in result.to_dask().items()} == {"out": (2, 4, 40, 8), "lse": (2, 4, 40)}
    assert result.to_dask()["out"].numblocks == result.out.cdata_shape
    with warnings.catch_warnings(action="error"):
        opened = xarray.open_zarr(result.path)
    for dataset in (result.to_xarray(), opened):
        assert dataset.sizes == {"batch": 2, "query_head": 4, "token": 40, "head_dim": 8}
        assert set(dataset) == {"out", "lse", "seqused_k"}
        for found in (dataset.out.values, result.to_dask()["out"].compute()):
            np.testing.assert_array_equal(found, result.out[...])
    if dtype is torch.bfloat16:
        tensor = torch.from_numpy(result.out[0].view("uint16")).view(torch.bfloat16)  # as documented
        np.testing.assert_array_equal(tensor.float().numpy(), result.out[0].astype(np.float32))
