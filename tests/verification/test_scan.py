"""A second pass accuses no right row, and finds every planted error."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from second_passes import Attended, StoredInMemory, attend32, attend64
from support import Arrays, normal_arrays, numpy_type

from oocattn import IntegrityError
from oocattn.verification.findings import AllRows
from oocattn.verification.noise import SUSPICIOUS
from oocattn.verification.scan import find_differences

DTYPES = ["float16", "bfloat16", "float32"]
ERRORS = {"float16": 0.01, "bfloat16": 0.03, "float32": 1e-4}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (60, 10)},
    "window and sink tokens": {"causal": True, "window_size": (60, 0), "sink_tokens": 3},
    "learnable sinks": {"causal": True, "learnable_sink": [2.0, -9.0]},
    "a sink beside nothing": {"learnable_sink": [40.0, 0.0]},
    "rows without a key": {"cu_seqlens_q": [0, 100, 300], "cu_seqlens_k": [0, 0, 300]},
}


def unit_arrays(dtype: str, tokens: int = 300, seed: int = 0, head_dim: int = 64) -> Arrays:
    return normal_arrays(tokens, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype, seed=seed)


def wrong_rows(found: AllRows) -> set[tuple[int, int]]:
    return {(row.head, row.token) for row in found.wrong}


@pytest.fixture(scope="module", params=DTYPES)
def right(request: pytest.FixtureRequest) -> Attended:
    return attend32(unit_arrays(request.param), causal=True)


@pytest.mark.parametrize("rounds_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_of_a_right_result_is_suspected(dtype: str, mask: str, rounds_weights: bool) -> None:
    found = attend32(unit_arrays(dtype), rounds_weights=rounds_weights, **MASKS[mask]).judge()
    assert (found.rows, found.suspected, found.recomputed, found.wrong_rows) == (600, 0, 0, 0)
    assert 0.5 < found.worst < SUSPICIOUS
    assert not found.inconclusive


@pytest.mark.parametrize("tokens", [200, 411, 600])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["large scores", "repeated keys", "values with a mean", "one value"])
def test_no_row_of_unusual_inputs_is_wrong(kind: str, dtype: str, tokens: int) -> None:
    q, k, v = unit_arrays("float32", tokens, seed=tokens, head_dim=16)
    if kind == "large scores":
        q = q * (1e4 / np.abs(q @ k.swapaxes(2, 3) / 4).max(axis=-1, keepdims=True)).astype(np.float32)
    elif kind == "repeated keys":
        k = np.repeat(k[:, :, ::40], 40, axis=2)[:, :, :tokens]
    else:
        v = v + 3 if kind == "values with a mean" else np.ones_like(v)
    arrays = tuple(array.astype(numpy_type(dtype)) for array in (q, k, v))
    found = attend32((arrays[0], arrays[1], arrays[2]), causal=True).judge()
    assert found.wrong_rows == 0
    assert found.suspected < 5
    assert not found.inconclusive


@pytest.mark.parametrize("bias_heads", [1, 2])
def test_no_row_with_other_terms_of_its_scores_is_suspected(bias_heads: int) -> None:
    """Also where biases of -inf shut every key of some rows, as of padding."""
    bias = np.random.default_rng(0).standard_normal((1, bias_heads, 300), np.float32)
    bias[:, :, :20], bias[:, :, 50] = -np.inf, -np.inf
    asked = {"causal": True, "softcap": 20.0, "alibi_slopes": [0.5, -0.01]}
    found = attend64(unit_arrays("float16"), bias, **asked).judge()
    assert found.suspected == 0
    assert found.found(found.noise) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_is_off_by_its_share_is_wrong(right: Attended, seed: int) -> None:
    """By 1% in float16, 3% in bfloat16, 0.01% in float32."""
    random = np.random.default_rng(seed)
    head, row = int(random.integers(2)), int(random.integers(300))
    error, exact = random.standard_normal(64), right.out[0, head, row]
    error *= ERRORS[right.arrays[0].dtype.name] * np.linalg.norm(exact) / np.linalg.norm(error)
    found = right.spoilt(head, row, out=exact + error).judge()
    assert wrong_rows(found) == {(head, row)}
    assert (found.suspected, found.recomputed, found.wrong_rows) == (1, 1, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        (np.ones(300), {"learnable_sink": [20.0, 15.0]}),
        (10.0 ** np.linspace(-4, 4, 300), {}),
        (np.where(np.arange(300) < 192, 1e-7, 1.0), {}),
    ],
    ids=["a sink takes nearly all weight", "values grow", "first values are tiny"],
)
def test_an_error_is_found_in_rows_that_are_small_beside_other_values(
    dtype: str, sizes: np.ndarray, asked: dict[str, Any]
) -> None:
    """Also one as small as the certificate says."""
    q, k, v = unit_arrays(dtype, head_dim=16)
    values = (v * sizes[:, None]).astype(v.dtype)
    small = attend32((q, k, values), causal=True, **asked)
    as_said = small.judge(block_rows=128)
    assert (as_said.suspected, as_said.open) == (0, 0)
    random, rows = np.random.default_rng(0), {(head, row) for head in (0, 1) for row in range(2, 190, 6)}
    for error in (2.0, 3 * as_said.found(as_said.most_noise)):
        spoilt = small
        for head, row in rows:
            exact, turned = small.out[0, head, row].astype(np.float64), random.standard_normal(16)
            changed = exact + turned * error * np.linalg.norm(exact) / np.linalg.norm(turned)
            spoilt = spoilt.spoilt(head, row, out=changed)
        assert wrong_rows(spoilt.judge(block_rows=128)) == rows


def test_two_rows_that_are_swapped_are_wrong(right: Attended) -> None:
    swapped = right.spoilt(0, 70, out=right.out[0, 1, 200]).spoilt(1, 200, out=right.out[0, 0, 70])
    assert wrong_rows(swapped.judge()) == {(0, 70), (1, 200)}


@pytest.mark.parametrize("error", [1e-3, -1e-3, 300.0, -300.0, np.nan, np.inf, -np.inf])
def test_a_wrong_lse_is_found(right: Attended, error: float) -> None:
    assert wrong_rows(right.spoilt(1, 99, lse=right.lse[0, 1, 99] + error).judge()) == {(1, 99)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found(right: Attended, value: float) -> None:
    out = right.out[0, 0, 7].copy()
    out[5] = value
    assert wrong_rows(right.spoilt(0, 7, out=out).judge()) == {(0, 7)}


def test_a_chunk_of_stale_values_is_found(right: Attended) -> None:
    q, k, v = right.arrays
    stale = v.copy()
    stale[:, :, 200:250] = unit_arrays(v.dtype.name, 50, seed=9)[2]
    found = replace(attend32((q, k, stale), causal=True), arrays=right.arrays).judge()
    assert {row for _, row in wrong_rows(found)} <= set(range(200, 300))
    assert found.wrong_rows == 200
    assert len(found.wrong) == 100


@pytest.mark.parametrize("kept", ["lse", "nothing"])
def test_a_key_that_is_dropped_from_a_row_is_found(right: Attended, kept: str) -> None:
    """Of the keys that weigh more than 1%, the one that weighs least; also where lse is right."""
    (q, k, v), head, row = (array.astype(np.float64) for array in right.arrays), 1, 150
    scores = k[0, 0, : row + 1] @ q[0, head, row] / 8
    weights = np.exp(scores - right.lse[0, head, row])
    dropped = np.argmin(np.where(weights > 0.01, weights, np.inf))
    rest = 1 - weights[dropped]
    out = (weights @ v[0, 0, : row + 1] - weights[dropped] * v[0, 0, dropped]) / rest
    lse = None if kept == "lse" else right.lse[0, head, row] + np.log(rest)
    assert wrong_rows(right.spoilt(head, row, out=out, lse=lse).judge()) == {(head, row)}


@pytest.mark.parametrize(
    ("asked", "instead"),
    [
        ({"causal": True, "window_size": (60, 0)}, {"causal": True, "window_size": (59, 0)}),
        ({"window_size": (60, 10)}, {"window_size": (60, 11)}),
        ({"causal": True}, {"window_size": (None, 1)}),
        ({"causal": True, "learnable_sink": [0.0, 1.0]}, {"causal": True, "learnable_sink": [1.0, 0.0]}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_border_of_the_mask_that_is_one_off_is_found(dtype: str, asked: Any, instead: Any) -> None:
    found = replace(attend32(unit_arrays(dtype), **instead), asked=asked).judge()
    assert found.wrong_rows > 100


@pytest.mark.parametrize("row", [{"out": 1e-7}, {"lse": -80.0}, {"lse": np.nan}])
def test_a_row_without_a_key_that_is_not_empty_is_wrong(row: dict[str, float]) -> None:
    empty = attend32(unit_arrays("float32"), **MASKS["rows without a key"])
    assert wrong_rows(empty.spoilt(1, 99, **row).judge()) == {(1, 99)}


def test_rows_that_should_not_be_finite_are_recomputed_after_those_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN among the values is in each causal row after it; where these are more than are recomputed, they stay open."""
    q, k, v = unit_arrays("float16")
    v[0, 0, 280, 3] = np.nan
    exact = attend64((q, k, v), causal=True)
    found = exact.judge()
    assert (found.suspected, found.wrong_rows, found.inconclusive) == (40, 0, False)
    monkeypatch.setattr("oocattn.verification.all_rows.MOST_RECOMPUTED", 5)
    found = exact.judge()
    assert (found.suspected, found.recomputed, found.wrong_rows, found.inconclusive) == (40, 5, 0, True)
    found = exact.spoilt(1, 290, out=1.0).spoilt(1, 4, out=1.0).judge()
    assert (found.recomputed, found.wrong_rows, found.inconclusive) == (5, 2, False)
    assert wrong_rows(found) == {(1, 4), (1, 290)}


def test_rows_that_cannot_be_read_are_recomputed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = unit_arrays("float16")
    v[0, 0, 280, 3] = np.nan
    exact, read = attend64((q, k, v), causal=True), StoredInMemory.read

    def fail(self: StoredInMemory, batch: int, head: int, start: int, out: Any) -> None:
        if start + len(out) > 290 and out.dtype == np.float16:
            raise IntegrityError("damaged")
        read(self, batch, head, start, out)

    monkeypatch.setattr(StoredInMemory, "read", fail)
    monkeypatch.setattr("oocattn.verification.all_rows.MOST_RECOMPUTED", 15)
    found = exact.judge(block_rows=10)
    assert (found.suspected, found.recomputed) == (40, 15)
    assert wrong_rows(found) == {*((0, row) for row in range(290, 300)), *((1, row) for row in range(290, 295))}


def test_rows_without_a_key_are_left_out_of_the_noise() -> None:
    """Here most of the rows, of which a learnable sink says the log-sum-exp."""
    asked = {"learnable_sink": [1.0, -1.0], "cu_seqlens_q": [0, 200, 300], "cu_seqlens_k": [0, 0, 300]}
    found = attend32(unit_arrays("float16"), **asked).judge()
    assert found.suspected == 0
    assert found.noise > 1e-4


@pytest.mark.parametrize("options", [{"block_rows": 64}, {"key_rows": 11}, {"group_rows": 1}, {"block_rows": 4096}])
def test_findings_do_not_depend_on_what_is_held_at_a_time(right: Attended, options: dict[str, int]) -> None:
    spoilt = right.spoilt(0, 0, out=2.0).spoilt(1, 299, out=2.0).spoilt(1, 8, lse=0.0)
    found, expected = spoilt.judge(**options), spoilt.judge()
    assert wrong_rows(found) == wrong_rows(expected) == {(0, 0), (1, 299), (1, 8)}
    assert found.worst == pytest.approx(expected.worst)
    assert (found.noise, found.most_noise, found.lse_noise) == (expected.noise, expected.most_noise, expected.lse_noise)


@pytest.mark.parametrize("threads", [2, 5])
def test_findings_do_not_depend_on_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with rows of NaN, with biases, and where blocks that begin first end last."""
    q, k, v = unit_arrays("float16")
    v[0, 0, 280, 3] = np.nan
    bias = np.random.default_rng(0).standard_normal((1, 2, 300), np.float32)
    bias[:, 0, :20] = -np.inf
    spoilt = attend64((q, k, v), bias, causal=True).spoilt(0, 30, out=2.0).spoilt(1, 250, out=2.0).spoilt(1, 8, lse=0.0)
    expected = spoilt.judge(threads=1, block_rows=64)
    read = StoredInMemory.read

    def read_slowly(self: StoredInMemory, batch: int, head: int, start: int, out: Any) -> None:
        time.sleep((300 - start) / 1e5)
        read(self, batch, head, start, out)

    monkeypatch.setattr(StoredInMemory, "read", read_slowly)
    assert spoilt.judge(threads=threads, block_rows=64) == expected
    assert wrong_rows(expected) == {(0, 30), (1, 250), (1, 8)}
    assert expected.suspected == 43


def test_memory_of_several_threads_is_counted() -> None:
    """With all that may be asked of scores and masks, and where every row is suspected."""
    tokens = 20_000
    arrays = unit_arrays("float32", tokens, head_dim=24)
    bias = np.zeros((1, 2, tokens), np.float32)
    bias[0, :, 5] = -np.inf
    edges = [0, 30, 30, 9000, tokens]
    asked = {"alibi_slopes": [0.5, 1.0], "learnable_sink": [0.0, 1.0], "cu_seqlens_q": edges, "window_size": (99, 0)}
    out, lse = np.full((1, 2, tokens, 24), 3.0, np.float32), np.ones((1, 2, tokens), np.float32)
    compared = Attended(arrays, asked, out, lse, bias).beside(out[..., :8], lse)
    for rows, threads in ((64, 1), (64, 4), (1000, 3), (tokens, 1), (tokens, 2)):
        tracemalloc.start()
        try:
            found = find_differences(compared, rows, threads, 100)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert found.suspected == 2 * tokens
        assert peak <= compared.nbytes(rows, threads) + (1 << 20)  # and what does not grow, of threads and calls
