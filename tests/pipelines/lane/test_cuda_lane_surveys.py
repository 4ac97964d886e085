"""Surveys in the CUDA lane without a GPU: what is summed over the rows of blocks, in buffers, turns and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from interrupting import EnoughError, interrupt
from passes import bits, planned
from reference import attention_by_definition
from support import normal_arrays, write_dataset
from surveying import compare

import oocattn
from oocattn import BudgetError, Survey
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations import forward
from oocattn.pipelines import second_pass, workplace
from oocattn.pipelines.lane import cuda_memory
from oocattn.planning.memory import Tiles

TOKENS = 157


class SurveyKernel:
    """The kernel of surveys on GPUs, pretended: the CPU's, with sums of its own that it adds to a GPU's.

    The device has no memory for calls of more than `most_rows` rows where `is_late` says so.
    """

    def __init__(self, most_rows: int = TOKENS, is_late: Callable[[Operands], bool] = lambda call: True) -> None:
        self._most_rows, self._is_late = most_rows, is_late

    def attend(self, call: Operands, state: AttentionState) -> None:
        if call.rows > self._most_rows and self._is_late(call):
            raise torch.OutOfMemoryError(f"{call.rows} rows are too many")
        reducing = call.reducing
        assert reducing is not None and reducing.totals is not None  # noqa: PT018
        totals, places = reducing.totals, reducing.places
        assert totals.key_numbers is not None and totals.received is not None and totals.pools is not None  # noqa: PT018
        numbers = totals.key_numbers.numpy().astype(np.int64)
        sums = [each.begin(len(call.query), totals.tokens, numbers) for each in totals.reductions]
        tokens = numbers[places.keys.start : places.keys.stop]
        own = replace(reducing, sums=sums, places=places._replace(key_tokens=tokens), totals=None)
        get_kernel("weights").attend(replace(call, reducing=own), state)
        received, pooled = (torch.from_numpy(each.arrays[0]) for each in sums)
        totals.received[0] += received
        totals.pools.sums[1] += pooled


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_memory, "SMALLEST_TILE", 1)
    have(monkeypatch, SurveyKernel())


def have(monkeypatch: pytest.MonkeyPatch, kernel: SurveyKernel) -> None:
    """Have runs use this kernel of surveys on GPUs."""

    def kernel_of(name: str) -> Kernel | SurveyKernel:
        return kernel if name == "hopper-survey" else get_kernel(name)

    monkeypatch.setattr(forward, "get_kernel", kernel_of)


@pytest.fixture
def result(fast_path: Path) -> Path:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))
    oocattn.attention(dataset, fast_path / "result.zarr", causal=True, engine="inline")
    return fast_path / "result.zarr"


def survey(result: Path, chunks: int = 5, division: str = "cqs", partials: str = "memory", **options: Any) -> Survey:
    with planned(chunks, division, partials=None if division == "strips" else partials, gpu_tiles=Tiles(23, 17)):
        return oocattn.survey(result, **{"engine": "inline", "top": 3, "pool": 11, "overwrite": True, **options})


def check(found: Survey, asked: dict[str, Any], mean_heads: bool = False) -> None:
    """Compare a survey with the dense weights."""
    q, k, _ = normal_arrays(TOKENS, heads=4, kv_heads=2)
    ones = np.broadcast_to(np.eye(TOKENS), (1, 2, TOKENS, TOKENS))
    weights = attention_by_definition(q, k, ones, **asked)[0]
    arrays = {name: np.asarray(array[...]) for name, array in found.arrays.items()}
    compare(arrays, weights, 3, 11, mean_heads, 1e-4)


@pytest.mark.parametrize("division", ["memory", "disk", "strips"])
@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_any_division_and_tiles_give_the_sums_of_the_dense_weights(result: Path, division: str, chunks: int) -> None:
    kind = {"division": "strips"} if division == "strips" else {"partials": division}
    check(survey(result, chunks, **kind), {"causal": True})


@pytest.mark.parametrize(
    "asked",
    [
        {"window_size": (31, 9), "sink_tokens": 4},
        {"causal": True, "cu_seqlens_q": [0, 3, 80, 110, TOKENS], "cu_seqlens_k": [0, 50, 60, 100, TOKENS]},
        {"queries": (40, 133), "causal": True},
    ],
    ids=str,
)
def test_keys_that_lie_apart_are_in_their_pools(fast_path: Path, asked: dict[str, Any]) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))
    oocattn.attention(dataset, fast_path / "result.zarr", engine="inline", **asked)
    check(survey(fast_path / "result.zarr"), asked)


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when part of a tile is summed"])
def test_out_of_memory_counts_nothing_twice(
    result: Path, monkeypatch: pytest.MonkeyPatch, partials: str, late: bool
) -> None:
    def is_late(call: Operands) -> bool:
        assert call.reducing is not None
        return call.reducing.places.keys.start > 0

    have(monkeypatch, SurveyKernel(9, is_late if late else lambda call: True))
    check(survey(result, partials=partials), {"causal": True})


def test_a_survey_that_was_interrupted_goes_on_to_the_same_bits(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bits(survey(result))
    monkeypatch.setattr(second_pass, "_refusal", lambda *_: "")  # there is no GPU
    monkeypatch.setattr(workplace, "warm_up", lambda *_: None)
    for kind, count in (("attended", 2), ("attended", 6), ("written", 4)):
        with pytest.raises(EnoughError):
            survey(result, callbacks=[interrupt(kind, count)])
        begun: list[oocattn.Event] = []
        assert bits(survey(result, callbacks=[begun.append])) == right
        assert [event.resumed for event in begun if event.kind == "started"] == [True]


def test_more_sums_than_are_planned_are_a_budget_error(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oocattn.planning.layout.totals_bytes", lambda *_: 256)
    with pytest.raises(BudgetError, match=r"the lane needs .* where 256"):
        survey(result)
