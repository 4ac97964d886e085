"""What a kernel computes does not depend on what the caller asks of torch, and the caller finds that as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from calling import call

from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.settings import full_precision
from oocattn.kernels.state import AttentionState
from oocattn.plain_threads import plain_threads

CPU = torch.device("cpu")


@contextmanager
def asked(set_it: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


def cpu_precision(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": lambda: asked(torch.set_default_device, "meta", None),
    "default dtype float64": lambda: asked(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype float16": lambda: asked(torch.set_default_dtype, torch.float16, torch.float32),
    "medium precision": lambda: asked(torch.set_float32_matmul_precision, "medium", "highest"),
    "high precision": lambda: asked(torch.set_float32_matmul_precision, "high", "highest"),
    "deterministic": lambda: asked(torch.set_deterministic_debug_mode, "error", "default"),
    "inference mode": torch.inference_mode,
    "gradients off": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
if hasattr(torch.backends.mkldnn, "matmul"):
    SETTINGS["bfloat16 on CPUs"] = lambda: asked(cpu_precision, "bf16", "none")


def computed(name: str, causal: bool) -> list[torch.Tensor]:
    """What a kernel makes of some tiles, as bits; in a thread of its own, as everything calls it."""

    def compute() -> list[torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        query, key, value = torch.randn((3, 300, 64), generator=generator, dtype=torch.float32, device="cpu")
        state = AttentionState.empty(1, 300, 64)
        for first, is_causal in ((0, causal), (100, False)):
            keys = slice(first, 300)
            call(get_kernel(name), query[None], key[keys], value[keys], state, scale=0.125, causal=is_causal)
        out, lse = torch.empty_like(state.num), torch.empty_like(state.den)
        finalise(state, out, lse)
        return [out.view(torch.int32), lse.view(torch.int32)]

    with plain_threads(1, "test") as thread:
        return thread.submit(compute).result()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_kernel_gives_the_same_bits_whatever_the_caller_asks_of_torch(setting: str, name: str, causal: bool) -> None:
    expected = computed(name, causal)
    with SETTINGS[setting]():
        found = computed(name, causal)
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


def precisions() -> list[str]:
    """What float32 products are computed in: on CPUs, on all devices of oneDNN, and on all devices."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch 2.8 has one name for it")
    return [place.fp32_precision for place in (torch.backends.mkldnn.matmul, torch.backends.mkldnn, torch.backends)]


@pytest.mark.parametrize("asked_for", ["none", "ieee", "tf32", "bf16"])
def test_reduced_precision_is_off_within_and_as_before_after_it(asked_for: str) -> None:
    try:
        cpu_precision(asked_for)
        before = precisions()
        with full_precision(CPU):
            assert precisions()[0] in ("none", "ieee")
        assert precisions() == before
    finally:
        cpu_precision("none")


def test_precision_that_was_inherited_is_inherited_again() -> None:
    every = torch.backends.mkldnn
    precisions()
    try:
        every.fp32_precision = "bf16"
        with full_precision(CPU):
            assert precisions()[0] == "ieee"
        assert precisions()[0] == "bf16"
        every.fp32_precision = "none"
        assert precisions()[0] == "none"
    finally:
        every.fp32_precision = "none"


def test_the_last_of_several_threads_gives_the_permission_back() -> None:
    try:
        cpu_precision("bf16")
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        first.enter_context(full_precision(CPU))
        second.enter_context(full_precision(CPU))
        first.close()
        assert precisions()[0] == "ieee"
        second.close()
        assert precisions()[0] == "bf16"
    finally:
        cpu_precision("none")


def test_what_the_caller_asks_for_meanwhile_stays() -> None:
    try:
        with full_precision(CPU):
            cpu_precision("bf16")
        assert precisions()[0] == "bf16"
    finally:
        cpu_precision("none")


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_nothing_is_refused_on_a_gpu_for_not_being_deterministic(mode: int) -> None:
    with asked(torch.set_deterministic_debug_mode, mode, 0):
        with full_precision(torch.device("cuda")):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_deterministic_debug_mode() == mode


def test_threads_that_compute_do_not_flush_small_numbers_to_zero() -> None:
    small = torch.full((1000,), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush them")
    try:
        assert not (small + small).any()
        with plain_threads(1, "test") as thread:
            assert thread.submit(lambda: (small + small).all()).result()
    finally:
        torch.set_flush_denormal(False)
