"""No arithmetic as good as torch's float32 is called wrong, whatever the problem; and errors that it has not are found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from every_kind import Case, a_case, in_float32
from in_memory import dataset_of, problem_of
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn.problem.problem import Problem
from oocattn.verification.findings import RowCheck
from oocattn.verification.recompute import ExactRow, compare_row, recompute_rows
from oocattn.verification.rounding import UNIT_ROUNDOFF

ROWS = 24


def exact_rows(case: Case, rows: int = ROWS, out_dtype: str | None = None) -> tuple[Problem, list[ExactRow]]:
    asked = {"causal": case.causal, "scale": case.scale, "out_dtype": out_dtype, **case.terms}
    problem = problem_of(case.arrays, case.key_bias, **asked)
    return problem, list(recompute_rows(problem, dataset_of(case.arrays, case.key_bias), borders=[], rows=rows, seed=0))


def checks(problem: Problem, exact: list[ExactRow], out: torch.Tensor, lse: torch.Tensor | None) -> list[RowCheck]:
    found = out.to(getattr(torch, problem.out_dtype)).double().numpy()
    return [compare_row(problem, row, found[row.token], row.lse if lse is None else float(lse[row.token])) for row in exact]


def check_in_torch(seed: int, most_tokens: int) -> None:
    case = a_case(seed, most_tokens)
    for out_dtype in dict.fromkeys(("float32", case.arrays[0].dtype.name)):
        problem, exact = exact_rows(case, out_dtype=out_dtype)
        for name, out, lse in in_float32(case):
            wrong = [check for check in checks(problem, exact, out, lse) if not check.passed]
            assert not wrong, f"seed {seed}, {case}, {name} to {out_dtype}: {wrong[0]}"


def check_a_run(seed: int, folder: Path, most_tokens: int) -> None:
    case = a_case(seed, most_tokens)
    random = np.random.default_rng(seed)
    dataset = write_dataset(folder / "dataset.zarr", case.arrays, key_bias=case.key_bias)
    out_dtype = str(random.choice(["float32", case.arrays[0].dtype.name]))
    chunks = min(int(random.choice([1, 3, 7, 13])), case.arrays[0].shape[2])
    plan = plan_for(dataset, causal=case.causal, scale=case.scale, out_dtype=out_dtype, chunks=chunks, **case.terms)
    carry_out(plan, dataset, folder / "result.zarr", overwrite=True)
    certificate = oocattn.verify(folder / "result.zarr", rows=ROWS)
    assert not certificate.failed, f"seed {seed}, {case}: {certificate}"


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_no_arithmetic_of_torch_is_called_wrong(first: int) -> None:
    for seed in range(first, first + 25):
        check_in_torch(seed, 250)


@pytest.mark.parametrize("seed", [3190, 6532], ids=["keys of -inf under a softcap", "keys that are nearly equal"])
def test_arithmetic_that_was_once_called_wrong_is_not(seed: int) -> None:
    check_in_torch(seed, 250)


def test_no_run_is_called_wrong(fast_path: Path) -> None:
    for seed in range(10_000, 10_012):
        check_a_run(seed, fast_path, 500)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20_000, 21_500, 100))
def test_no_arithmetic_of_torch_is_called_wrong_in_many_problems(first: int) -> None:
    for seed in range(first, first + 100):
        check_in_torch(seed, 3000)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(30_000, 31_000, 100))
def test_no_run_is_called_wrong_in_many_problems(first: int, fast_path: Path) -> None:
    for seed in range(first, first + 100):
        check_a_run(seed, fast_path, 3000)


@pytest.mark.parametrize(("tokens", "head_dim", "most"), [(300, 64, 10), (1500, 64, 10), (1500, 128, 10), (700, 256, 11)])
@pytest.mark.parametrize("causal", [False, True])
def test_unit_normal_rows_are_allowed_little(tokens: int, head_dim: int, most: int, causal: bool) -> None:
    """The median allowance is at most ten times the median error of torch's float32; of D = 256 on some processors 10.7.

    Of lse it is so of what errs most: on some processors a library's matrix products err by less than half of that.
    """
    case = Case("normal", "normal", normal_arrays(tokens, heads=1, head_dim=head_dim), causal, head_dim**-0.5)
    problem, exact = exact_rows(case, 200)
    lse_errors, allowed_lse = [], 0.0
    for _, out, lse in in_float32(case):
        found = checks(problem, exact, out, lse)
        assert np.median([row.allowed for row in found]) < most * np.median([row.error for row in found])
        if lse is not None:
            lse_errors.append(np.median([row.lse_error for row in found]))
            allowed_lse = max(allowed_lse, np.median([row.allowed_lse for row in found]))
    assert 0 < allowed_lse < 10 * max(lse_errors)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_error_of_one_percent_is_found_in_rows_with_an_offset(head_dim: int) -> None:
    q, k, v = normal_arrays(600, heads=1, head_dim=head_dim)
    case = Case("offset", "normal", (q + 5, k + 5, v), False, head_dim**-0.5)
    problem, exact = exact_rows(case)
    for row in exact:
        assert compare_row(problem, row, row.out.astype(np.float32), row.lse).passed
        assert not compare_row(problem, row, 1.01 * row.out, row.lse).passed
        assert not compare_row(problem, row, row.out, row.lse + 0.01).passed


def test_a_score_counts_as_much_as_its_key_weighs() -> None:
    """A key that no row attends to speak of may have any score: the allowances hardly change."""
    q, k, v = normal_arrays(200, heads=1, head_dim=64)
    q = np.abs(q)
    allowed = []
    for level in (-1.0, -1000.0):
        k[0, 0, 17] = level
        _, exact = exact_rows(Case("one", "normal", (q, k, v), False, 0.125))
        allowed.append([(row.allowed, row.allowed_lse) for row in exact if row.token != 17])
    np.testing.assert_allclose(allowed[1], allowed[0], rtol=0.2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_allowed_for(dtype: str) -> None:
    """As the matrix units of GPUs take them: with an output in float32, which hides nothing of it."""
    case = Case("normal", "normal", normal_arrays(1000, heads=1, head_dim=64, dtype=dtype), False, 0.125)
    dataset, problem = dataset_of(case.arrays), problem_of(case.arrays, out_dtype="float32")
    q, k, v = (torch.from_numpy(array[0, 0].astype(np.float32)) for array in case.arrays)
    scores = (q @ k.T) * 0.125
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = (weights.to(getattr(torch, dtype)).float() @ v) / weights.sum(-1, keepdim=True)
    options = {"borders": [], "rows": 100, "seed": 0}
    rounded = list(recompute_rows(problem, dataset, **options, weight_roundoff=UNIT_ROUNDOFF[dtype]))
    found = checks(problem, rounded, out, None)
    assert all(row.passed and row.shows for row in found)
    assert max(row.error / row.allowed for row in found) > 0.2
    assert not any(row.passed for row in checks(problem, list(recompute_rows(problem, dataset, **options)), out, None))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_partial_results_of_16_bits_are_allowed_for(dtype: str) -> None:
    """As libraries return them for spans of keys, also where they cancel."""
    arrays = normal_arrays(512, heads=1, head_dim=64, dtype=dtype)
    arrays[2][0, 0] = np.where(np.arange(512) < 256, 1.3, -1.3)[:, None] + 1e-2 * arrays[2][0, 0].astype(np.float32)
    dataset, problem = dataset_of(arrays), problem_of(arrays, out_dtype="float32")
    q, k, v = (torch.from_numpy(array[0, 0].astype(np.float64)) for array in arrays)
    weights = torch.softmax((q @ k.T) * 0.125, -1)
    parts = [(weights[:, keys], v[keys]) for keys in (slice(0, 256), slice(256, 512))]
    means = [(of / of.sum(-1, keepdim=True) @ values).to(getattr(torch, dtype)).double() for of, values in parts]
    out = sum(mean * of.sum(-1, keepdim=True) for mean, (of, _) in zip(means, parts, strict=True))
    options = {"borders": [], "rows": 100, "seed": 0, "weight_roundoff": UNIT_ROUNDOFF[dtype]}
    found = checks(problem, list(recompute_rows(problem, dataset, **options)), out, None)
    assert all(row.passed for row in found)


def test_equal_keys_have_equal_errors() -> None:
    """Where every key and value comes a hundred times, out is the same, and what scores may lose of it is no less."""
    q, k, v = normal_arrays(2, heads=1, head_dim=64)
    k += np.where(np.arange(64) % 2, 8, -8).astype(np.float32)
    allowed = []
    for times in (1, 100):
        arrays = tuple(np.tile(array, (1, 1, times, 1)) for array in (np.abs(q), k, v))
        _, exact = exact_rows(Case("channels", "normal", arrays, False, 0.1), 2 * times)
        allowed.append(np.median([(row.allowed, row.allowed_lse) for row in exact], axis=0))
    assert (allowed[1] > 0.7 * allowed[0]).all()


@pytest.mark.parametrize("key_rows", [1, 64])
def test_a_score_that_is_all_error_makes_a_row_show_nothing(key_rows: int) -> None:
    """It is far below the largest, in terms that cancel; in float32 it may be far above."""
    q, k, v = (np.zeros((1, 1, 2, 2), np.float32) for _ in range(3))
    q[:], k[0, 0, 0], v[0, 0] = (2e5, 2e5), (5e4, -5.0000003e4), [[1, 1], [-1, -1]]
    dataset, problem = dataset_of((q, k, v)), problem_of((q, k, v), scale=1.0)
    for row in recompute_rows(problem, dataset, borders=[], rows=2, seed=0, key_rows=key_rows):
        np.testing.assert_allclose(row.out, -1)
        assert compare_row(problem, row, np.ones(2), row.lse).passed
        assert not compare_row(problem, row, np.ones(2), row.lse).shows
        assert not compare_row(problem, row, np.full(2, 2.0), row.lse).passed


def test_overflow_is_never_called_wrong_and_shows_nothing() -> None:
    q, k, v = normal_arrays(50, heads=1, head_dim=8)
    for arrays in ((q, k, np.full_like(v, 3.3e38)), (q * 1e19, k * 1e19, v), (q * 1e25, k * 1e25, v)):
        problem, exact = exact_rows(Case("huge", "huge", arrays, False, 1.0))
        for row in exact:
            for out in (row.out, np.full_like(row.out, np.nan), np.full_like(row.out, np.inf)):
                found = compare_row(problem, row, out, math.nan)
                assert found.passed
                assert not found.shows


def test_out_is_inf_where_its_dtype_overflows() -> None:
    q, k, v = normal_arrays(1, heads=1, head_dim=8)
    v[..., :4] = 7e4
    problem, (row,) = exact_rows(Case("one", "large", (q, k, v), False, 1.0), out_dtype="float16")
    right = torch.from_numpy(row.out).half().double().numpy()
    assert np.isinf(right[:4]).all()
    assert compare_row(problem, row, right, row.lse).passed
    for wrong in (-right, np.full(8, np.inf), np.where(np.isinf(right), 65504.0, right)):
        assert not compare_row(problem, row, wrong, row.lse).passed


def test_values_of_zero_are_shown_to_give_zero() -> None:
    q, k, v = normal_arrays(40, heads=1, head_dim=8)
    problem, exact = exact_rows(Case("normal", "zero", (q, k, 0 * v), True, 1.0))
    for row in exact:
        found = compare_row(problem, row, np.zeros(8), row.lse)
        assert (found.passed, found.shows, found.error) == (True, True, 0.0)
        assert not compare_row(problem, row, np.full(8, 1e-30), row.lse).passed


def test_values_that_cancel_show_something() -> None:
    """out is 0 up to rounding: that it is, is shown."""
    q, k, v = normal_arrays(1000, heads=1, head_dim=8)
    v = np.broadcast_to(np.where(np.arange(1000) < 500, 1, -1).astype(np.float32)[:, None], v.shape).copy()
    problem, exact = exact_rows(Case("zero", "halves", (0 * q, k, v), False, 1.0))
    for row in exact:
        found = compare_row(problem, row, np.full(8, 1e-8), row.lse)
        assert found.passed
        assert found.shows
        assert not compare_row(problem, row, np.full(8, 1e-3), row.lse).passed


def test_rows_without_a_finite_score_are_zero() -> None:
    """Every score is -inf: out is 0 and lse -inf, as of a row without a key; and one NaN makes a row NaN."""
    q, k, v = np.abs(normal_arrays(6, heads=1, head_dim=4))
    k = np.full_like(k, -np.inf)
    problem, exact = exact_rows(Case("one", "normal", (q, k, v), True, 1.0))
    assert all(compare_row(problem, row, np.zeros(4), -np.inf).passed for row in exact)
    assert not any(compare_row(problem, row, np.full(4, np.nan), np.nan).passed for row in exact)
    k[0, 0, 2] = np.nan
    problem, exact = exact_rows(Case("one", "normal", (q, k, v), True, 1.0))
    assert [bool(np.isnan(row.out).all()) for row in exact] == [False, False, True, True, True, True]
    assert all(compare_row(problem, row, row.out, row.lse).passed for row in exact)


def test_an_inf_in_a_value_hides_no_other_element() -> None:
    q, k, v = normal_arrays(20, heads=1, head_dim=8)
    v[0, 0, 3, 2] = np.inf
    problem, exact = exact_rows(Case("normal", "inf", (q, k, v), False, 1.0))
    for row in exact:
        assert compare_row(problem, row, row.out, row.lse).passed
        assert not compare_row(problem, row, np.where(np.isinf(row.out), row.out, 2 * row.out), row.lse).passed


def test_a_softcap_flattens_the_errors_of_large_scores() -> None:
    """Scores near 1e5 in float32 show nothing of a row; capped at 5 they are 5 or -5, whatever they were."""
    q, k, v = normal_arrays(100, heads=1, head_dim=64)
    q, k = q * 100, np.abs(k) * 100
    shown = {}
    for softcap in (None, 5.0):
        problem, exact = exact_rows(Case("offset", "normal", (np.abs(q), k, v), False, 1.0, {"softcap": softcap}))
        shown[softcap] = [compare_row(problem, row, row.out.astype(np.float32), row.lse).shows for row in exact]
        assert not any(compare_row(problem, row, 1.02 * row.out, row.lse).passed for row in exact if softcap)
    assert not any(shown[None])
    assert all(shown[5.0])


def test_distances_that_float32_rounds_are_allowed_for() -> None:
    """Rows a million keys before the first: slope times distance is rounded to 2^-6, which is a share of every weight."""
    q, k, v = normal_arrays(1, heads=1), normal_arrays(50, heads=1)[1], normal_arrays(50, heads=1)[2]
    queries = np.zeros((1, 1, 1_000_000, 8), np.float32)
    queries[0, 0, :1] = q[0][0, 0]
    arrays = queries, k, v
    problem = problem_of(arrays, alibi_slopes=[0.3], queries=(0, 1))
    (row,) = recompute_rows(problem, dataset_of(arrays), borders=[], rows=1, seed=0)
    score = np.float32(problem.scale) * (k[0, 0] @ queries[0, 0, 0])
    score = score - np.float32(0.3) * (np.arange(50, dtype="f4") + np.float32(999_950))
    weights = np.exp(score - score.max())
    found = compare_row(
        problem, row, (weights @ v[0, 0]).astype("f8") / weights.sum(), float(score.max() + np.log(weights.sum()))
    )
    assert found.passed
    assert found.error > 1e-4
    assert not found.shows


@pytest.mark.parametrize("terms", [{"alibi_slopes": [3e38]}, {"alibi_slopes": [-3e38]}], ids=["-inf", "inf"])
def test_terms_that_overflow_are_never_called_wrong(terms: dict[str, list[float]]) -> None:
    q, k, v = normal_arrays(3, heads=1, head_dim=8)
    arrays = np.tile(q, (1, 1, 3, 1)), k, v  # no row is at a key but the last ones
    problem, exact = exact_rows(Case("normal", "normal", arrays, False, 1.0, terms))
    far = [row for row in exact if row.token < 5]
    assert far
    for row in far:
        for out, lse in ((np.zeros(8), -math.inf), (np.full(8, np.nan), math.nan)):
            assert compare_row(problem, row, out, lse).passed
            assert not compare_row(problem, row, out, lse).shows


def test_a_learnable_sink_is_exact_where_it_is_all_there_is() -> None:
    q, k, v = normal_arrays(6, heads=1, head_dim=4)
    problem, exact = exact_rows(Case("one", "normal", (q, k[:, :, :2], v[:, :, :2]), True, 1.0, {"learnable_sink": [0.7]}))
    for row in exact[:4]:  # rows 4 and 5 have keys
        assert compare_row(problem, row, np.zeros(4), float(np.float32(0.7))).passed
        assert not compare_row(problem, row, np.zeros(4), 0.7001).passed
        assert not compare_row(problem, row, np.full(4, 1e-6), float(np.float32(0.7))).passed
