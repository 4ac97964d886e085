"""Whatever is asked of an attention, in any composition: it is attention as float64 has it, and nothing dead is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import any_attention
import pytest
import torch
from compositions import Case, make_case
from pretend import pretend_a_gpu

from oocattn.kernels.registry import device_type, get_kernel, kernel_names
from oocattn.pipelines.lane import cuda_memory


@pytest.mark.parametrize("seed", range(300))
def test_any_composition_is_attention_and_reads_nothing_dead(seed: int, fast_path: Path) -> None:
    check(any_attention.check, make_case(seed), fast_path)


@pytest.mark.parametrize("seed", range(300, 320))
def test_any_composition_is_resumed_to_the_same_bits_and_verified(seed: int, fast_path: Path) -> None:
    check(any_attention.check_resuming, make_case(seed), fast_path)


@pytest.mark.parametrize("seed", range(400, 430))
def test_any_composition_on_the_lane_of_a_gpu_that_is_pretended(
    seed: int, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_memory, "SMALLEST_TILE", 1)
    check(any_attention.check, any_attention.with_kernel(make_case(seed), "torch"), fast_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [name for name in kernel_names() if device_type(name) == "cuda"])
@pytest.mark.parametrize("first", range(10_000, 10_300, 50))
def test_any_composition_on_every_kernel_of_a_gpu(first: int, kernel: str, fast_path: Path) -> None:
    for seed in range(first, first + 50):
        case = any_attention.with_kernel(make_case(seed, longest=700), kernel)
        device = torch.device("cuda")
        if not get_kernel(kernel).unsupported_reason(device, case.dtype, case.head_dim, case.value_dim):
            check(any_attention.check, case, fast_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 6000, 50))
def test_thousands_more_compositions(first: int, fast_path: Path) -> None:
    for seed in range(first, first + 50):
        check(any_attention.check, make_case(seed), fast_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(6000, 6500, 50))
def test_hundreds_more_compositions_are_resumed(first: int, fast_path: Path) -> None:
    for seed in range(first, first + 50):
        check(any_attention.check_resuming, make_case(seed), fast_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(8000, 8200, 20))
def test_compositions_of_thousands_of_tokens(first: int, fast_path: Path) -> None:
    for seed in range(first, first + 20):
        check(any_attention.check, make_case(seed, longest=1500), fast_path)


def check(what: Callable[[Case, Path], None], case: Case, folder: Path) -> None:
    """Check a case; a failure begins with one line: its seed, and what it asks."""
    folder.mkdir(exist_ok=True)
    try:
        what(case, folder)
    except Exception as error:
        again = f"python tests/any_attention.py {case.seed} --longest {case.longest} --kernel {case.kernel}"
        raise AssertionError(f"{case}; rerun: {again}") from error
