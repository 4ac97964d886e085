"""Surveys of random compositions, compared with the dense weights in float64.

    python tests/surveying.py 17 4711

surveys the cases of these seeds (`compositions`), and prints what they ask and what does not hold; `--longest` is as a
failed test says.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from any_attention import plan_of, rerun, rounding_of_scores, store
from compositions import Case, World
from numpy.typing import NDArray
from passes import planned
from reference import Array64, attention_by_definition
from support import carry_out

import oocattn

SMALLEST = 1e-37  # below, float32 weights may count as 0


def weights_by_definition(case: Case, world: World) -> Array64:
    """The weights [B, heads, rows, keys] of a case."""
    q, k, _ = world.arrays
    ones = np.broadcast_to(np.eye(case.keys), (case.batch, case.kv_heads, case.keys, case.keys))
    asked = {name: value for name, value in case.asked.items() if name not in ("out_dtype", "key_bias")}
    return attention_by_definition(q, k, ones, **asked, key_bias=world.bias if case.uses_bias else None)[0]


def check_survey(case: Case, folder: Path) -> None:
    """Survey the result of a case by a random division, and compare every array with the definition."""
    world = World.of(case)
    dataset = store(case, world, folder / "dataset.zarr")
    result = folder / "result.zarr"
    carry_out(plan_of(case, dataset), dataset, result)
    chance = random.Random(case.seed)
    top, pool = chance.choice([1, 3, 8, 200]), chance.choice([1, 2, 7, 1024])
    top = min(top, 128)
    mean_heads = chance.random() < 0.3
    decomposition = chance.choice(["cqs", "strips"])
    partials = chance.choice(["memory", "disk"]) if decomposition == "cqs" else None
    with planned(case.chunks, decomposition, partials=partials, threads=chance.choice([1, 2])):
        oocattn.survey(result, top=top, pool=pool, mean_heads=mean_heads, engine="inline")
    group = zarr.open_group(result, mode="r")
    found = {name: np.asarray(group[name]) for name in ("received", "entropy", "top_keys", "top_weights", "pooled")}
    weights = weights_by_definition(case, world)
    lse = np.abs(world.lse[np.isfinite(world.lse)]).max(initial=0.0)
    compare(found, weights, top, pool, mean_heads, 1e-5 + 4 * rounding_of_scores(case, world) + 1.2e-7 * float(lse))


def compare(
    found: dict[str, NDArray[Any]], weights: Array64, top: int, pool: int, mean_heads: bool, tolerance: float
) -> None:
    """Compare the arrays of a survey with the weights [B, H, rows, keys], whose relative error may be `tolerance`."""
    near = {"rtol": tolerance, "atol": 1e-9}
    np.testing.assert_allclose(found["received"], weights.sum(axis=2), **near)
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy, spread = -(weights * logarithms).sum(axis=3), 1 + np.abs(weights * logarithms).sum(axis=3)
    assert (np.abs(found["entropy"] - entropy) <= tolerance * spread * 2).all()
    assert not (found["entropy"] < 0).any()
    largest = -np.sort(-weights, axis=3)[..., :top]
    kept = largest.shape[3]
    np.testing.assert_allclose(found["top_weights"][..., :kept], largest, rtol=tolerance, atol=SMALLEST)
    keys, there = found["top_keys"], found["top_keys"] >= 0
    assert np.array_equal(there, found["top_weights"] > 0)
    assert not there[..., kept:].any()
    of_keys = np.take_along_axis(weights, np.where(there, keys, 0), axis=3)
    np.testing.assert_allclose(np.where(there, of_keys, 0), found["top_weights"], rtol=tolerance, atol=SMALLEST)
    for row in keys.reshape(-1, keys.shape[3]):
        named = row[row >= 0]
        assert len(set(named.tolist())) == len(named)
    pooled = pools_of(weights, pool)
    np.testing.assert_allclose(found["pooled"], pooled.mean(axis=1, keepdims=True) if mean_heads else pooled, **near)


def pools_of(weights: Array64, pool: int) -> Array64:
    """Weights summed over at most so many blocks along each side."""
    summed = weights
    for axis in (2, 3):
        count = weights.shape[axis]
        size = -(-count // min(pool, count))
        summed = np.add.reduceat(summed, np.arange(0, count, size), axis=axis)
    return summed


if __name__ == "__main__":
    sys.exit(rerun(sys.argv[1:], (__doc__ or "").partition("\n")[0], check_survey))
