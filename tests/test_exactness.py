"""Numbers at the ends of their range: large logits, NaN and Inf, and what the dtype of out loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import attention64, relative_error
from support import Arrays, carry_out, normal_arrays, plan_for, write_dataset

from oocattn import verify


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
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
    strips = {"chunks": 3, "decomposition": "strips"}
    for options in ({"chunks": 7}, {**strips, "causal": True}, {"chunks": 6, "causal": True}, strips):
        plan = plan_for(dataset, **options)
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
