"""The forward pass by lanes, under masks of every kind: out and lse against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
from reference import attention_by_definition, mask_by_definition, relative_error
from support import normal_arrays, plan_for, run_of, with_partials, write_dataset

from oocattn.errors import TaintedError
from oocattn.operations import forward
from oocattn.operations.tiles import Tile, make_tiles
from oocattn.pipelines.lane.lane import Lane
from oocattn.problem.mask import Mask
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays

TOKENS = 210

DOCUMENTS = [0, 3, 60, 60, 61, 150, 210]

MASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "causal": (TOKENS, {"causal": True}),
    "window": (TOKENS, {"causal": True, "window_size": (40, 0)}),
    "sinks": (TOKENS, {"causal": True, "window_size": (40, 0), "sink_tokens": 5}),
    "two-sided": (TOKENS, {"window_size": (30, 11)}),
    "late": (120, {"causal": True}),  # the first rows attend no key
    "documents": (TOKENS, {"causal": True, "cu_seqlens_q": DOCUMENTS}),
    "other documents": (90, {"cu_seqlens_q": DOCUMENTS, "cu_seqlens_k": [0, 0, 20, 50, 51, 60, 90]}),
    "prefix": (TOKENS, {"causal": True, "prefix": 50, "cu_seqlens_q": DOCUMENTS}),
    "used": (TOKENS, {"causal": True, "seqused_k": [77]}),
    "everything": (
        150,
        {
            "causal": True, "window_size": (25, 0), "sink_tokens": 3, "prefix": 2, "cu_seqlens_q": DOCUMENTS,
            "cu_seqlens_k": [0, 9, 40, 41, 41, 99, 150], "queries": (31, 199),
        },
    ),
}  # fmt: skip
"""Keys and mask by name."""


def arrays_of(keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = normal_arrays(TOKENS, heads=2, kv_heads=1)[0]
    return q, *normal_arrays(keys, heads=2, kv_heads=1, seed=1)[1:]


def lane_with(folder: Path, monkeypatch: pytest.MonkeyPatch, keys: int, device: str, **options: Any) -> Lane:
    """A lane on a dataset of so many keys."""
    dataset = write_dataset(folder / "dataset.zarr", arrays_of(keys))
    if device == "cpu":
        plan = plan_for(dataset, **options)
    else:
        pretend.pretend_a_gpu(monkeypatch)
        plan = pretend.gpu_plan(dataset, (29, 17), **options)
    return Lane(run_of(folder, with_partials(plan, "memory")), "cpu" if device == "cpu" else "cuda:0")


def attend_all(lane: Lane) -> int:
    pairs = 0
    for turn, index in enumerate(lane.plan.division_of(0).indices):
        lane.stage(turn, 0, index)
        pairs += lane.attend(turn).pairs
    for chunk in filter(lane.plan.query_rows, range(lane.plan.query_chunks)):
        lane.merge(0, chunk)
        lane.write(0, chunk)
    return pairs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{"chunks": 7}, {"chunks": 5, "decomposition": "strips"}, {"chunks": 1}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_any_mask_is_attention(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], device: str
) -> None:
    keys, asked = MASKS[name]
    lane = lane_with(fast_path, monkeypatch, keys, device, **options, **asked)
    rows = slice(*asked.get("queries", (0, TOKENS)))
    of_mask = {option: value for option, value in asked.items() if option != "queries"}
    attended = mask_by_definition(1, TOKENS, keys, **of_mask)[0][0, rows]
    assert attend_all(lane) == lane.plan.problem.pairs == 2 * attended.sum()
    expected, lse = attention_by_definition(*arrays_of(keys), **asked)
    result = ResultArrays.open(ResultPaths.at(fast_path / "result.zarr").unfinished)
    assert relative_error(result.out[...], expected) < 2e-6
    np.testing.assert_allclose(result.lse[...], lse, atol=1e-5)
    lane.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shift", [1, -1])
def test_a_window_that_is_shifted_by_one_is_caught(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int, device: str
) -> None:
    """Most rows attend as many keys as they must: their number alone would not tell."""
    shifted = Mask.of(TOKENS, TOKENS + shift, causal=True, left=40)

    def tiles(_: Mask, *rest: Any, **options: Any) -> Iterator[Tile]:
        return make_tiles(shifted, *rest, **options)

    monkeypatch.setattr(forward, "make_tiles", tiles)
    lane = lane_with(fast_path, monkeypatch, TOKENS, device, chunks=7, causal=True, window_size=(40, 0))
    with pytest.raises(TaintedError, match=r"keys were attended(,| than) expected"):
        attend_all(lane)
    lane.close()
