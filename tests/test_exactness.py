"""The promise itself: any problem, division, budget, storage and place of partials gives attention as float64 has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Array64, attention64, relative_error
from support import Arrays, carry_out, normal_arrays, plan_for, write_dataset
from zarr.codecs import BloscCodec, ZstdCodec

from oocattn import BudgetError, Plan, Result, verify

TOLERANCE = {"float16": 3e-4, "bfloat16": 2e-3, "float32": 2e-6}
"""Relative error of the output that is allowed, by the output's dtype: its rounding, with little to spare."""

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}

DTYPES = ("float16", "bfloat16", "float32")
TOKENS = st.one_of(st.integers(1, 200), st.integers(1, 20), st.sampled_from([1, 2, 61, 127, 128, 129, 257, 509, 512, 599]))
FEW, SEVERAL, MANY = st.integers(1, 5), st.integers(1, 14), st.sampled_from([13, 20, 31])
CHUNKS = st.integers(0, 9).flatmap(lambda number: FEW if number < 6 else SEVERAL if number < 9 else MANY)
HEAD_DIMS = st.one_of(st.integers(1, 256), st.sampled_from([1, 2, 3, 8, 31, 64, 80, 128, 255, 256]))
STORAGE = st.sampled_from(["plain", "plain", "plain", "zstd", "blosc", "sharded"])


@dataclass(frozen=True)
class Case:
    """One problem with everything that may not change its answer."""

    batch: int
    kv_heads: int
    group_size: int
    tokens: int
    head_dim: int
    dtype: str
    out_dtype: str
    causal: bool
    scale: float | None
    chunks: int
    decomposition: str
    partials: str
    tight_budget: bool
    storage: str
    input_chunk_rows: int
    squeezed: bool  # arrays [H, N, D]
    seed: int


@st.composite
def cases(draw: st.DrawFn, causal: st.SearchStrategy[bool]) -> Case:
    tokens = draw(TOKENS)
    decomposition = draw(st.sampled_from(["cqs", "cqs", "strips"]))
    chunks = min(draw(CHUNKS), tokens, 60 if decomposition == "cqs" else 6)
    batch, kv_heads = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)])) if chunks < 5 else (1, 1)
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        batch=batch,
        kv_heads=kv_heads,
        group_size=draw(st.sampled_from([1, 1, 2, 3, 8])),
        tokens=tokens,
        head_dim=draw(HEAD_DIMS),
        dtype=dtype,
        out_dtype=draw(st.one_of(st.just(dtype), st.sampled_from(DTYPES))),
        causal=draw(causal),
        scale=draw(st.sampled_from([None, None, 0.05])),
        chunks=chunks,
        decomposition=decomposition,
        partials="memory" if decomposition == "strips" else draw(st.sampled_from(["memory", "disk"])),
        tight_budget=draw(st.booleans()),
        storage=draw(STORAGE),
        input_chunk_rows=draw(st.integers(max(1, tokens // 8), tokens)),
        squeezed=batch == 1 and draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )


def arrays_of(case: Case) -> Arrays:
    return normal_arrays(
        case.tokens,
        heads=case.kv_heads * case.group_size,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        batch=case.batch,
        dtype=case.dtype,
        seed=case.seed,
    )


def store(case: Case, arrays: Arrays, path: Path) -> Path:
    q, k, v = (array[0] for array in arrays) if case.squeezed else arrays
    rows = case.input_chunk_rows
    options: dict[str, Any] = {}
    if case.storage == "sharded":
        options["shards"] = (*(1 for _ in q.shape[:-2]), 2 * rows, case.head_dim)
    elif case.storage != "plain":
        options["compressors"] = ZstdCodec(level=1) if case.storage == "zstd" else BloscCodec(clevel=1, typesize=2)
    return write_dataset(path, (q, k, v), rows, **options)


def plan_of(case: Case, dataset: Path) -> Plan:
    options: dict[str, Any] = {
        "causal": case.causal,
        "scale": case.scale,
        "out_dtype": case.out_dtype,
        "chunks": case.chunks,
        "decomposition": case.decomposition,
    }
    if case.tight_budget:
        with pytest.raises(BudgetError) as refused:
            plan_for(dataset, host_memory=1, **options)
        options["host_memory"] = int(re.search(r"works is (\d+)MiB", str(refused.value))[1]) << 20
    return plan_for(dataset, partials=case.partials, **options)


def assert_exact(result: Result, expected: Array64, lse: Array64, out_dtype: str, largest: float) -> None:
    found = np.asarray(result.out[...]).astype(np.float64)
    assert found.shape == expected.shape
    if expected.size < 512:  # too few elements for their rounding errors to average out
        allowed = UNIT_ROUNDOFF[out_dtype] * np.abs(expected) + TOLERANCE["float32"] * largest
        assert np.all(np.abs(found - expected) <= allowed)
    else:
        assert relative_error(found, expected) <= TOLERANCE[out_dtype]
    assert np.abs(np.asarray(result.lse[...]) - lse).max() <= 1e-5


@given(case=cases(st.just(False)))
@settings(max_examples=40)
def test_every_way_of_computing_it_is_attention(case: Case, fast_path: Path) -> None:
    check_exactness(case, fast_path)


@given(case=cases(st.just(True)))
@settings(max_examples=40)
def test_every_way_of_computing_it_is_causal_attention(case: Case, fast_path: Path) -> None:
    check_exactness(case, fast_path)


@pytest.mark.slow
@given(case=cases(st.booleans()))
@settings(max_examples=500)
def test_hundreds_more_ways_of_computing_it(case: Case, client: Client, fast_path: Path) -> None:
    check_exactness(case, fast_path, client)


def check_exactness(case: Case, fast_path: Path, client: Client | Literal["inline"] = "inline") -> None:
    arrays = arrays_of(case)
    dataset = store(case, arrays, fast_path / "dataset.zarr")
    plan = plan_of(case, dataset)
    result = carry_out(plan, dataset, fast_path / "result.zarr", client, overwrite=True)
    expected, lse = attention64(*arrays, case.causal, plan.problem.scale)
    assert_exact(result, expected, lse, case.out_dtype, np.abs(arrays[2].astype(np.float64)).max())
    assert result.report.pairs == plan.problem.pairs
    assert result.report.not_finite == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_thousand(fast_path: Path, dtype: str, causal: bool) -> None:
    q, k, v = normal_arrays(150, heads=2, kv_heads=2, head_dim=64, dtype="float32")
    q[:, 0], k[:, 0] = q[:, 0] * 16, k[:, 0] * 16
    q[:, 1], k[:, 1] = -9 + q[:, 1] / 10, 14 + k[:, 1] / 10  # near -1,000 in every row
    arrays = tuple(array.astype(normal_arrays(1, dtype=dtype)[0].dtype) for array in (q, k, v))
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    plan = plan_for(dataset, causal=causal, out_dtype="float32", chunks=7)
    result = carry_out(plan, dataset, fast_path / "result.zarr")
    expected, lse = attention64(*arrays, causal, 0.125)
    assert lse[:, 0].max() > 800
    assert lse[:, 1].max() < -900
    # Terms that add up to 1,000 in absolute value are rounded to 3e-5 each in float32: so far may logits be off.
    assert relative_error(np.asarray(result.out[...]), expected) < 1e-4
    np.testing.assert_allclose(result.lse[...], lse, rtol=5e-7, atol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_rows_with_one_key_are_their_value(fast_path: Path, magnitude: float) -> None:
    arrays = normal_arrays(1, heads=3, kv_heads=3, head_dim=40)
    arrays = (arrays[0] * 300, arrays[1], (arrays[2] * magnitude).astype(np.float32))
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    for causal in (False, True):
        result = carry_out(plan_for(dataset, causal=causal), dataset, fast_path / f"{causal}.zarr")
        np.testing.assert_allclose(result.out[...], arrays[2], rtol=1e-6)


def sdpa_by_rows(arrays: Arrays, causal: bool) -> np.ndarray:
    """torch's attention, a row at a time over the keys that the row attends, so that nothing masked can leak."""
    q, k, v = (torch.from_numpy(array) for array in arrays)
    rows = []
    for token in range(q.shape[2]):
        stop = token + 1 if causal else q.shape[2]
        attended = (q[:, :, token : token + 1], k[:, :, :stop], v[:, :, :stop])
        rows.append(torch.nn.functional.scaled_dot_product_attention(*attended))
    return torch.cat(rows, dim=2).numpy()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("array", "partials"), [(0, "memory"), (1, "disk"), (2, "memory")])
def test_nan_and_inf_flow_as_in_torch(fast_path: Path, array: int, causal: bool, partials: str) -> None:
    """One of them in each head, of q, k or v."""
    arrays = normal_arrays(40, heads=3, kv_heads=3, head_dim=4)
    arrays[array][0, :, 23, 2] = np.nan, np.inf, -np.inf
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    plan = plan_for(dataset, causal=causal, chunks=7, partials=partials)
    result = carry_out(plan, dataset, fast_path / "result.zarr")
    expected = sdpa_by_rows(arrays, causal)
    assert not np.isfinite(expected[:, 0]).all()
    np.testing.assert_allclose(result.out[...], expected, rtol=2e-5, atol=1e-6)
    assert result.report.not_finite == 3
    assert verify(result.path).passed


def test_every_element_that_is_not_finite_is_counted_once(fast_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = normal_arrays(101, heads=6, kv_heads=2, head_dim=5, batch=2, dtype="float16")
    for array in arrays:
        array.reshape(-1)[random.choice(array.size, 37, replace=False)] = random.choice([np.nan, np.inf, -np.inf], 37)
    dataset = write_dataset(fast_path / "dataset.zarr", arrays)
    for options in ({"chunks": 7}, {"chunks": 3, "decomposition": "strips"}, {"chunks": 6}):
        for causal in (False, True):
            plan = plan_for(dataset, causal=causal, **options)
            result = carry_out(plan, dataset, fast_path / "result.zarr", overwrite=True)
            assert result.report.not_finite == 3 * 37
            assert "111 elements are NaN or Inf" in str(result.report)


@pytest.mark.parametrize(("size", "out_dtype"), [(3.3e38, "float32"), (7e4, "float16"), (1e6, "float16")])
def test_what_overflows_in_out_is_counted_and_said(
    fast_path: Path, caplog: pytest.LogCaptureFixture, size: float, out_dtype: str
) -> None:
    q, k, v = normal_arrays(101, heads=6, kv_heads=2, head_dim=5, batch=2)
    v = np.where(v > 0, size, -size).astype(np.float32)
    dataset = write_dataset(fast_path / "dataset.zarr", (q, k, v))
    for options in ({"chunks": 7}, {"chunks": 3, "decomposition": "strips"}):
        plan = plan_for(dataset, out_dtype=out_dtype, causal=True, **options)
        caplog.clear()
        result = carry_out(plan, dataset, fast_path / "result.zarr", overwrite=True)
        count = int((~np.isfinite(np.asarray(result.out[...]).astype(np.float64))).sum())
        assert count > 0
        assert (result.report.not_finite, result.report.out_not_finite) == (0, count)
        assert result.report.out_overflowed == (0 if out_dtype == "float32" else count)
        assert f"out          {count:,} elements are NaN or Inf" in str(result.report)
        said = "NaN or Inf, and none of the inputs" if out_dtype == "float32" else "Inf because their values are too large"
        assert f"{count:,} elements of out are {said}" in caplog.text
        assert said in str(result.report)
        certificate = verify(result.path)
        assert (certificate.ledger.not_finite, certificate.ledger.out_not_finite) == (0, count)
        assert f"0 NaN or Inf in the inputs, {count:,} in out" in str(certificate)
        assert not certificate.failed


def test_what_the_dtype_of_out_loses_is_told_apart_from_what_inputs_bring(
    fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = normal_arrays(101, heads=6, kv_heads=2, head_dim=5, batch=2)
    v[0, 0, :, 0], v[0, 0, :, 1], v[0, 0, :, 2] = 1e6, np.nan, 1e-9
    dataset = write_dataset(fast_path / "dataset.zarr", (q, k, v))
    plan = plan_for(dataset, out_dtype="float16", chunks=7)
    report = carry_out(plan, dataset, fast_path / "result.zarr").report
    assert (report.not_finite, report.out_not_finite, report.out_overflowed, report.out_underflowed) == (101, 606, 303, 303)
    assert "303 elements of out are Inf because their values are too large for its dtype" in caplog.text
    assert "303 elements of out are 0 because their values are too small for its dtype" in caplog.text
    certificate = verify(fast_path / "result.zarr")
    assert "606 in out, 303 of them too large for its dtype, and 303 zeros too small for it" in str(certificate)
