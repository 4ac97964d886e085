"""The keys of sampled rows, as ranges of any kind, and rows in float64 over such ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import a_problem, normal_arrays, write_dataset

from oocattn.problem.problem import make_problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.verification import recompute
from oocattn.verification.attended import AttendedKeys, Int64s, attended_ranges

TOKENS = 210


def sink_and_window(tokens: Int64s) -> Int64s:
    """The first 3 keys and the last 20 up to a row's own, as two ranges that do not overlap."""
    last = tokens + 1
    sink = np.minimum(last, 3)
    return np.stack([np.stack([np.zeros_like(last), sink], -1), np.stack([np.maximum(last - 20, sink), last], -1)], 1)


def matrix(ranges: Int64s, keys: int) -> np.ndarray:
    found = np.zeros((len(ranges), keys), bool)
    for row, of_row in enumerate(ranges):
        for first, last in of_row:
            found[row, first:last] = True
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_ranges_are_the_keys_of_the_mask(causal: bool) -> None:
    problem = a_problem(40, causal=causal)
    expected = [[row for keys in problem.mask.key_ranges(token) for row in keys] for token in range(40)]
    found = matrix(attended_ranges(problem, np.arange(40)), 40)
    assert [list(np.flatnonzero(row)) for row in found] == expected


def test_counts_span_and_hidden_keys_follow_from_the_ranges() -> None:
    ranges = sink_and_window(np.array([0, 2, 10, 50, 60]))
    keys, expected = AttendedKeys(ranges), matrix(ranges, 70)
    assert keys.span == range(61)
    assert AttendedKeys(ranges[3:, 1:]).span == range(31, 61)
    for start, stop in ((0, 70), (0, 1), (2, 40), (45, 51), (65, 70)):
        np.testing.assert_array_equal(keys.count(start, stop), expected[:, start:stop].sum(1))
        hidden = keys.hidden(start, stop)
        np.testing.assert_array_equal(
            np.zeros((5, stop - start), bool) if hidden is None else hidden, ~expected[:, start:stop]
        )
    assert keys.hidden(0, 1) is None


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("key_rows", [7, 8192])
def test_rows_over_two_ranges_are_those_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key_rows: int, special: bool
) -> None:
    q, k, v = normal_arrays(TOKENS, heads=4, kv_heads=2)
    if special:
        v[0, :, 100, 1], v[0, :, 2, 3] = np.nan, np.inf
    dataset = Dataset.open(write_dataset(tmp_path / "dataset.zarr", (q, k, v)))
    problem = make_problem(*dataset.specs)
    monkeypatch.setattr(recompute, "attended_ranges", lambda _, tokens: sink_and_window(tokens))
    for row in recompute.recompute_rows(problem, dataset, borders=[100], rows=50, seed=1, key_rows=key_rows):
        keys = np.flatnonzero(matrix(sink_and_window(np.array([row.token])), TOKENS)[0])
        key, value = (array[0, row.head // 2, keys].astype(np.float64) for array in (k, v))
        scores = problem.scale * (key @ q[0, row.head, row.token].astype(np.float64))
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(row.out, weights @ value, rtol=1e-11, atol=1e-13)
        assert row.lse == pytest.approx(np.log(np.exp(scores).sum()), rel=1e-12)
