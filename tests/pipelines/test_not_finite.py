"""NaN and Inf of the inputs are counted once where a row attends or is attended, and not at all where none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import mask_by_definition
from support import carry_out, plan_for, write_dataset

QUERIES, KEYS, HEADS, HEAD_DIM, VALUE_DIM = 60, 75, 4, 3, 2

DOCUMENTS = {"cu_seqlens_q": [0, 10, 10, 37, 60], "cu_seqlens_k": [0, 8, 20, 66, 75]}

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "sinks": {"causal": True, "window_size": (3, 0), "sink_tokens": 2},
    "documents": {"causal": True, **DOCUMENTS},
    "some keys": {"seqused_k": [40, 0]},
    "some rows": {"causal": True, "window_size": (5, 0), "queries": (17, 41)},
}

DIVISIONS: list[dict[str, Any]] = [
    {"chunks": 1},
    {"chunks": 7, "decomposition": "cqs"},
    {"chunks": 5, "decomposition": "cqs", "partials": "disk"},
    {"chunks": 6, "decomposition": "strips"},
]


def arrays() -> list[np.ndarray]:
    """Of two entries, and two KV heads of two heads each."""
    random = np.random.default_rng(0)
    shapes = ((2, HEADS, QUERIES, HEAD_DIM), (2, HEADS // 2, KEYS, HEAD_DIM), (2, HEADS // 2, KEYS, VALUE_DIM))
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def attended_by(asked: dict[str, Any]) -> np.ndarray:
    """The pairs that are attended: [B, queries, keys]."""
    matrix, _ = mask_by_definition(2, QUERIES, KEYS, **{name: each for name, each in asked.items() if name != "queries"})
    start, stop = asked.get("queries", (0, QUERIES))
    matrix[:, :start] = matrix[:, stop:] = False
    return matrix


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_live_rows_are_counted_once_and_dead_ones_not(fast_path: Path, name: str, division: dict[str, Any]) -> None:
    """Each element of q, k and v is NaN or Inf: the report has as many as rows of live pairs have elements."""
    matrix = attended_by(MASKS[name])
    q, k, v = arrays()
    for array, value in ((q, np.nan), (k, np.inf), (v, np.nan)):
        array[...] = value
    dataset = write_dataset(fast_path / "dataset.zarr", (q, k, v), 16)
    plan = plan_for(dataset, **MASKS[name], **division)
    report = carry_out(plan, dataset, fast_path / "result.zarr").report
    rows, keys = int(matrix.any(2).sum()), int(matrix.any(1).sum())
    assert report.not_finite == HEADS * rows * HEAD_DIM + HEADS // 2 * keys * (HEAD_DIM + VALUE_DIM)
    assert report.rows_without_keys == HEADS * (plan.problem.batch * plan.problem.out_rows - rows)


@pytest.mark.parametrize(
    ("name", "division"),
    [
        pytest.param(name, division, marks=[] if (number + other) % 2 else pytest.mark.slow)
        for number, name in enumerate(name for name in MASKS if name not in ("full", "causal"))
        for other, division in enumerate(DIVISIONS)
    ],
    ids=str,
)
def test_what_no_live_pair_needs_may_be_anything(fast_path: Path, name: str, division: dict[str, Any]) -> None:
    """The bits are those of the same run without NaN in dead rows, and nothing is counted or said."""
    matrix = attended_by(MASKS[name])
    found = []
    for value in (1.0, np.nan):
        q, k, v = arrays()
        for entry in range(2):
            q[entry][:, ~matrix[entry].any(1)] = value
            for array in (k, v):
                array[entry][:, ~matrix[entry].any(0)] = value
        dataset = write_dataset(fast_path / f"{value}.zarr", (q, k, v), 16)
        plan = plan_for(dataset, **MASKS[name], **division)
        result = carry_out(plan, dataset, fast_path / f"result-{value}.zarr")
        assert result.report.not_finite == result.report.out_not_finite == 0
        assert "NaN" not in str(result.report)
        found.append((result.out[...], result.lse[...]))
    assert not (matrix.any(1).all() and matrix.any(2).all())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize(("heads", "value"), [(1, np.inf), (HEADS, np.inf), (1, np.nan), (1, -np.inf)])
def test_a_bias_of_a_key_is_counted_once_and_none_that_leaves_its_key_out(fast_path: Path, heads: int, value: float) -> None:
    """A bias of -inf is meant: it leaves its key out. One that all heads share is counted once."""
    live = int(attended_by(MASKS["window"]).any(1).sum())
    bias = np.full((2, heads, KEYS), value, np.float32)
    dataset = write_dataset(fast_path / "dataset.zarr", tuple(arrays()), 16, key_bias=bias)
    report = carry_out(plan_for(dataset, chunks=7, **MASKS["window"]), dataset, fast_path / "result.zarr").report
    assert report.not_finite == (0 if value == -np.inf else heads * live)
