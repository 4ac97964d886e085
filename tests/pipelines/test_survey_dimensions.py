"""The arrays of a survey as xarray opens them: their dimensions and attributes, and which head and row is where."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from passes import planned
from reference import attention_by_definition
from support import normal_arrays, write_dataset
from surveying import pools_of

import oocattn

BATCH, HEADS, KV_HEADS, ROWS, KEYS, TOP, POOL = 2, 6, 2, 40, 70, 3, 8

DIMENSIONS = {
    "received": ("{head}", "key_token"),
    "entropy": ("{head}", "{row}"),
    "top_keys": ("{head}", "{row}", "rank"),
    "top_weights": ("{head}", "{row}", "rank"),
    "pooled": ("{pooled_head}", "row_block", "key_block"),
}

ASKED: dict[str, tuple[dict[str, Any], bool]] = {
    "all": ({}, False),
    "some heads": ({"heads": [1, 2, 5]}, False),
    "some rows": ({"queries": (7, 29)}, False),
    "some rows and heads, averaged": ({"heads": [0, 4], "queries": (7, 29)}, True),
    "one head, of which there is no average": ({"heads": [4]}, True),
    "all, averaged": ({}, True),
}


@pytest.fixture(scope="module")
def arrays() -> list[Any]:
    q, k, v = normal_arrays(KEYS, heads=HEADS, kv_heads=KV_HEADS, batch=BATCH)
    return [q[:, :, :ROWS], k, v]


@pytest.fixture(scope="module")
def dataset(arrays: list[Any], shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", arrays)


@pytest.mark.parametrize("asked", ASKED)
def test_xarray_opens_the_arrays_with_the_names_and_sizes_of_what_was_asked(
    asked: str, dataset: Path, arrays: list[Any], fast_path: Path
) -> None:
    options, mean_heads = ASKED[asked]
    result = oocattn.attention(dataset, fast_path / "r.zarr", causal=True, engine="inline", **options)
    with planned(3):
        oocattn.survey(result, top=TOP, pool=POOL, mean_heads=mean_heads, engine="inline")
    with warnings.catch_warnings():  # xarray leaves a filter behind
        opened = xarray.open_zarr(result.path, consolidated=True)

    head, row = ("asked_query_head" if "heads" in options else "query_head"), "query_token"
    row = "asked_token" if "queries" in options else row
    heads, (start, stop) = options.get("heads", range(HEADS)), options.get("queries", (0, ROWS))
    averaged = mean_heads and len(heads) > 1
    named = {"head": head, "row": row, "pooled_head": "mean_head" if averaged else head}
    for name, dimensions in DIMENSIONS.items():
        assert opened[name].dims == ("batch", *(each.format(**named) for each in dimensions)), name
    rows, keys = -(-(stop - start) // POOL), -(-KEYS // POOL)
    sizes = {"batch": BATCH, head: len(heads), row: stop - start, "key_token": KEYS, "rank": TOP}
    sizes |= {"row_block": -(-(stop - start) // rows), "key_block": -(-KEYS // keys)}
    assert dict(opened.sizes).items() >= sizes.items()
    said = {"row_block": rows, "key_block": keys, "first_row": start, "rows": stop - start, "keys": KEYS}
    found = {name: opened[name].attrs["oocattn"]["survey"] for name in DIMENSIONS}
    assert found == {name: said if name == "pooled" else {} for name in DIMENSIONS}

    weights = weights_of(arrays)[:, list(heads), start:stop]
    np.testing.assert_allclose(opened["received"].values, weights.sum(axis=2), rtol=1e-4, atol=1e-6)
    largest = -np.sort(-weights, axis=3)[..., :TOP]
    np.testing.assert_allclose(opened["top_weights"].values, largest, rtol=1e-4, atol=1e-6)
    pooled = pools_of(weights, POOL)
    expected = pooled.mean(axis=1, keepdims=True) if averaged else pooled
    np.testing.assert_allclose(opened["pooled"].values, expected, rtol=1e-4, atol=1e-6)


def weights_of(arrays: list[Any]) -> Any:
    """The weights [B, Hq, rows, keys] of all heads and rows."""
    q, k, _ = arrays
    every = np.broadcast_to(np.eye(KEYS), (BATCH, KV_HEADS, KEYS, KEYS))
    return attention_by_definition(q, k, every, causal=True)[0]
