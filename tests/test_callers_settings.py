"""A call has the result that it has in a plain process, whatever the caller set up, and leaves that as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from support import assert_same_bits, carry_out, normal_arrays, plan_for, replanned, write_dataset

import oocattn
from oocattn.cli.doctor import kernel_error
from oocattn.planning.kernel_rates import measured_rate


@contextmanager
def small_numbers_flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def medium_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "small numbers flushed": small_numbers_flushed,
    "default device": lambda: torch.device("meta"),
    "medium precision": medium_precision,
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_are_errors,
    "inference mode": torch.inference_mode,
}


def with_small_values(tokens: int = 130) -> Any:
    q, k, v = normal_arrays(tokens, head_dim=16)
    v[..., ::3] *= np.float32(1e-39)
    return q, k, v


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_and_its_certificate_are_those_of_a_plain_call(fast_path: Path, setting: str) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", with_small_values())
    options: dict[str, Any] = {"causal": True, "chunks": 7, "decomposition": "cqs"}
    plain = oocattn.attention(dataset, fast_path / "plain.zarr", **options)
    expected = oocattn.verify(plain.path, rows=8)
    measured_rate.cache_clear()  # so that it is measured within
    with SETTINGS[setting]():
        found = oocattn.attention(dataset, fast_path / "found.zarr", **options)
        certificate = oocattn.verify(found.path, rows=8)
    assert_same_bits(found, plain)
    assert certificate.passed
    assert certificate.rows == expected.rows


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_doctor_finds_a_kernel_right(setting: str) -> None:
    from oocattn.cli.doctor import _attempt

    with SETTINGS[setting]():
        check = _attempt("kernel", lambda: (max(kernel_error("cpu", "float32", "diagonal")) < 1e-5, ""))
    assert check.passed, check


def test_small_numbers_are_imported_as_they_are(fast_path: Path) -> None:
    arrays = dict(zip("qkv", with_small_values(), strict=True))
    for name, array in arrays.items():
        np.save(fast_path / f"{name}.npy", array.astype(np.float64))
    files = {name: fast_path / f"{name}.npy" for name in arrays}
    with small_numbers_flushed():
        oocattn.import_arrays(fast_path / "dataset.zarr", **files, layout="bhnd", dtype="float32")
        assert not torch.full((1,), 1e-40).add(0).any()  # as before
    import zarr

    for name, array in arrays.items():
        np.testing.assert_array_equal(zarr.open_group(fast_path / "dataset.zarr", mode="r")[name][...], array)


def test_threads_that_begin_after_a_run_have_as_many_threads_of_torch_as_before(client: Client, fast_path: Path) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(40))

    def of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(torch.get_num_threads).result()

    before = of_a_new_thread()
    plan = replanned(plan_for(dataset, chunks=3), threads=before + 1)
    carry_out(plan, dataset, fast_path / "result.zarr", client)
    assert of_a_new_thread() == before
