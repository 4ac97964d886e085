"""Whole runs on a GPU within their budgets, and where the device has less memory than was planned."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_datasets import BUDGETS, MIB, Datasets, assert_verified
from distributed import Client
from support import (
    CrampedKernel,
    carry_out,
    with_partials,
)

import oocattn
from oocattn import BudgetError, Plan
from oocattn.kernels.kernel import Operands
from oocattn.kernels.libraries.aten import CudnnKernel
from oocattn.kernels.state import AttentionState
from oocattn.operations import forward, make_operation
from oocattn.pipelines.lane import cuda_memory
from oocattn.pipelines.lane.cuda import CudaDevice
from oocattn.pipelines.lane.rehearsal import rehearse, sample_tiles
from oocattn.planning.kernel_rates import measured_rate
from oocattn.problem.mask import Cover

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")]


def reserved_bytes() -> int:
    """What torch holds of the device when it has given back what it need not."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize(
    ("budget", "causal"), [(128 * MIB, True), (512 * MIB, True), (512 * MIB, False), (2048 * MIB, True)]
)
def test_the_device_budget_is_kept_and_used_and_given_back(
    client: Client, datasets: Datasets, tmp_path: Path, budget: int, causal: bool
) -> None:
    dataset = datasets(heads=4, kv_heads=4, head_dim=64, dtype="float16")
    options: dict[str, Any] = {"causal": causal, "device_memory": budget, "host_memory": "4GiB", "kernel": "cudnn"}
    usual, before = sys.getswitchinterval(), reserved_bytes()
    torch.cuda.reset_peak_memory_stats()
    measured_rate.cache_clear()  # measuring counts too
    plan = oocattn.plan(dataset, lanes=1, **options)
    measuring = torch.cuda.max_memory_reserved() - before
    result = carry_out(plan, dataset, tmp_path / "result.zarr", client)
    peak = torch.cuda.max_memory_reserved() - before
    assert peak <= plan.peak_device <= budget
    assert measuring <= plan.peak_device
    assert peak >= 0.85 * plan.peak_device or plan.peak_device < measuring + 48 * MIB
    assert reserved_bytes() - before <= 4 * MIB
    assert sys.getswitchinterval() == usual
    assert result.report.out_of_memory == 0
    assert_verified(result, "float16")


@pytest.mark.usefixtures("half")
def test_a_rehearsal_makes_every_call_within_the_plan_and_gives_all_back(
    half_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    attend = CudnnKernel.attend

    def note(self: CudnnKernel, operands: Operands, state: AttentionState) -> None:
        made.append((operands.rows, operands.keys, operands.intervals is None))
        attend(self, operands, state)

    monkeypatch.setattr(CudnnKernel, "attend", note)
    before = reserved_bytes()
    torch.cuda.reset_peak_memory_stats()
    rehearse(half_plan)
    calls = [
        (shape.rows, shape.keys, shape.cover is Cover.FULL) for shape in sample_tiles(half_plan, make_operation(half_plan))
    ]
    assert sorted(made) == sorted(calls * torch.cuda.device_count())
    assert torch.cuda.max_memory_reserved() - before <= half_plan.peak_device
    assert torch.cuda.memory_reserved() == before


def test_a_budget_too_small_for_any_tile_is_refused_with_one_that_works(
    client: Client, datasets: Datasets, tmp_path: Path
) -> None:
    dataset = datasets(20_011, heads=2, kv_heads=1, head_dim=64, dtype="float16")
    with pytest.raises(BudgetError, match=r"device_memory 1 MiB is too small .* works is (\d+)MiB") as refused:
        oocattn.plan(dataset, kernel="flash", device_memory="1MiB")
    smallest = re.search(r"works is (\d+)MiB", str(refused.value))[1]
    before = reserved_bytes()
    torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"kernel": "flash", "causal": True, "device_memory": f"{smallest}MiB", "client": client}
    assert_verified(oocattn.attention(dataset, tmp_path / "result.zarr", **options), "float16")
    assert torch.cuda.max_memory_reserved() - before <= int(smallest) * MIB


# Out of memory


def cramp(monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
    usual = forward.get_kernel
    monkeypatch.setattr(forward, "get_kernel", lambda name: CrampedKernel(usual(name), most_rows))


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_out_of_memory_goes_on_with_smaller_tiles(
    client: Client, half: Path, half_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partials: str
) -> None:
    most_rows = half_plan.tiles.query // 3
    cramp(monkeypatch, most_rows)
    result = carry_out(with_partials(half_plan, partials), half, tmp_path / "result.zarr", client)
    assert_verified(result, "float16")
    assert result.report.out_of_memory == 2
    assert result.report.pairs == half_plan.problem.pairs


def test_no_room_for_the_smallest_tile_is_a_budget_error(
    client: Client, datasets: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = datasets(20_011, heads=2, kv_heads=1, head_dim=64, dtype="float16")
    plan = oocattn.plan(dataset, chunks=1, decomposition="cqs", kernel="flash", **BUDGETS)
    cramp(monkeypatch, 0)
    with pytest.raises(BudgetError, match=r"no memory left even for tiles of \d+ queries: free some, or lower"):
        carry_out(plan, dataset, tmp_path / "result.zarr", client)
    assert not (tmp_path / "result.zarr").exists()


def test_a_device_that_is_too_full_at_first_gets_smaller_tiles(
    client: Client, half: Path, half_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    made: list[CudaDevice] = []
    empty, take = torch.empty, CudaDevice.__init__

    def refuse_once(*shape: Any, **options: Any) -> torch.Tensor:
        if "device" in options and torch.device(options["device"]).type == "cuda" and not refused:
            refused.append(1)
            raise torch.OutOfMemoryError("the device is full")
        return empty(*shape, **options)

    def keep(self: CudaDevice, *arguments: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(cuda_memory.torch, "empty", refuse_once)
            take(self, *arguments)
        made.append(self)

    monkeypatch.setattr(CudaDevice, "__init__", keep)
    result = carry_out(half_plan, half, tmp_path / "result.zarr", client)
    assert refused
    assert made[0].tile_rows.count == half_plan.tiles.query // 2
    assert_verified(result, "float16")


# Events
