"""The forward pass by lanes, under masks that no option asks for yet: out and lse against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
from reference import relative_error
from support import normal_arrays, plan_for, run_of, with_partials, write_dataset

from oocattn.errors import TaintedError
from oocattn.operations import forward
from oocattn.operations.tiles import Tile, make_tiles
from oocattn.pipelines.lane.lane import Lane
from oocattn.problem import problem as problem_module
from oocattn.problem.mask import Causal, Mask, Ramp
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays

TOKENS = 210


@dataclass(frozen=True)
class Window(Mask):
    """Keys 20 to 24, and those from 60 before a row's own to 19 before it: the first rows have the former alone."""

    shift: int = 0

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        start, stop = (Ramp(offset + self.shift, 25, self.keys) for offset in (-60, -18))
        return Ramp.constant(20), Ramp.constant(25), start, stop

    def __str__(self) -> str:
        return "window"


@dataclass(frozen=True)
class Late(Mask):
    """The keys from 100 before a row's own to 50 before it: the first rows have none."""

    @property
    def ramps(self) -> tuple[Ramp, Ramp, Ramp, Ramp]:
        end = Ramp.constant(self.keys)
        return Ramp(-100, 0, self.keys), Ramp(-49, 0, self.keys), end, end

    def __str__(self) -> str:
        return "late"


def lane_with(folder: Path, monkeypatch: pytest.MonkeyPatch, mask: Mask, device: str, **options: Any) -> Lane:
    """A lane on a dataset whose problem has this mask."""
    monkeypatch.setattr(problem_module, "make_mask", lambda queries, keys, causal: mask)
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=2, kv_heads=1))
    if device == "cpu":
        plan = plan_for(dataset, **options)
    else:
        pretend.pretend_a_gpu(monkeypatch)
        plan = pretend.gpu_plan(dataset, (29, 17), **options)
    return Lane(run_of(folder, with_partials(plan, "memory")), "cpu" if device == "cpu" else "cuda:0")


def attend_all(lane: Lane) -> int:
    pairs = 0
    for index in range(lane.plan.division.subproblems):
        lane.stage(index, 0, index)
        pairs += lane.attend(index).pairs
    for chunk in range(lane.plan.chunks):
        lane.merge(0, chunk)
        lane.write(0, chunk)
    return pairs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{"chunks": 7}, {"chunks": 5, "decomposition": "strips"}, {"chunks": 1}], ids=str)
@pytest.mark.parametrize("mask", [Window(TOKENS, TOKENS), Late(TOKENS, TOKENS), Causal(TOKENS, TOKENS)], ids=str)
def test_any_mask_is_attention(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, mask: Mask, options: dict[str, Any], device: str
) -> None:
    lane = lane_with(fast_path, monkeypatch, mask, device, **options)
    assert attend_all(lane) == lane.plan.problem.pairs == 2 * mask.pairs()
    q, k, v = (array.astype(np.float64)[0] for array in normal_arrays(TOKENS, heads=2, kv_heads=1))
    hidden = np.ones((TOKENS, TOKENS), bool)
    for row in range(TOKENS):
        for keys in mask.key_ranges(row):
            hidden[row, keys.start : keys.stop] = False
    scores = np.where(hidden, -np.inf, lane.plan.problem.scale * q @ k[0].T)
    with np.errstate(invalid="ignore", divide="ignore"):
        maximum = scores.max(-1, keepdims=True)
        weights = np.nan_to_num(np.exp(scores - maximum))
        total = weights.sum(-1, keepdims=True)
        expected = np.nan_to_num(weights @ v[0] / total)
        lse = (np.log(total) + maximum)[..., 0]
    result = ResultArrays.open(ResultPaths.at(fast_path / "result.zarr").unfinished)
    assert relative_error(result.out[0], expected) < 2e-6
    np.testing.assert_allclose(result.lse[0], lse, atol=1e-5)
    lane.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shift", [1, -1])
def test_a_window_that_is_shifted_by_one_is_caught(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int, device: str
) -> None:
    """Most rows attend as many keys as they must: their number alone would not tell."""
    mask = Window(TOKENS, TOKENS)
    shifted = Window(TOKENS, TOKENS, shift)

    def tiles(_: Mask, *rest: Any) -> Iterator[Tile]:
        return make_tiles(shifted, *rest)

    monkeypatch.setattr(forward, "make_tiles", tiles)
    lane = lane_with(fast_path, monkeypatch, mask, device, chunks=7)
    with pytest.raises(TaintedError, match=r"keys were attended(,| than) expected"):
        attend_all(lane)
    lane.close()
