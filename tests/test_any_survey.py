"""Whatever is asked of an attention, in any composition: a survey of it has the dense weights of float64, reduced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import surveying
from compositions import Case, make_case
from passes import planned
from support import normal_arrays, write_dataset

import oocattn


@pytest.mark.parametrize("seed", range(60))
def test_a_survey_of_any_composition_is_that_of_the_dense_weights(seed: int, fast_path: Path) -> None:
    check(make_case(seed), fast_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1200, 20))
def test_surveys_of_hundreds_more_compositions(first: int, fast_path: Path) -> None:
    for seed in range(first, first + 20):
        check(make_case(seed), fast_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000, 2020))
def test_surveys_of_compositions_of_thousands_of_tokens(seed: int, fast_path: Path) -> None:
    check(make_case(seed, longest=1500), fast_path)


def check(case: Case, folder: Path) -> None:
    """Check a case; a failure begins with one line: its seed, and what it asks."""
    folder.mkdir(exist_ok=True)
    try:
        surveying.check_survey(case, folder)
    except Exception as error:
        again = f"python tests/surveying.py {case.seed} --longest {case.longest}"
        raise AssertionError(f"{case}; rerun: {again}") from error


@pytest.mark.parametrize("chunks", [1, 7])
@pytest.mark.parametrize("asked", [{}, {"causal": True}, {"window_size": (40, 9)}, {"causal": True, "queries": (200, 500)}])
def test_what_the_keys_of_a_head_receive_is_as_many_as_its_rows(
    chunks: int, asked: dict[str, object], fast_path: Path
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(500, heads=4, kv_heads=2, batch=2, head_dim=16))
    result = oocattn.attention(dataset, fast_path / "result.zarr", engine="inline", **asked)
    with planned(chunks):
        found = oocattn.survey(result.path, arrays=["received", "pooled"], pool=9, engine="inline")
    rows = result.lse.shape[2]
    for name, axes in (("received", 2), ("pooled", (2, 3))):
        total = np.asarray(found.arrays[name]).sum(axes, dtype=np.float64)
        assert total.shape == (2, 4)
        assert (np.abs(total - rows) <= 1e-5 * rows).all()
