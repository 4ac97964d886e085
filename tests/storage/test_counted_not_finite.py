"""NaN and Inf are counted, of every dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oocattn.pipelines.lane.memory import as_numpy
from oocattn.storage.inputs.values import count_not_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(places=st.sets(st.integers(0, 599_999), max_size=20))
def test_elements_that_are_nan_or_inf_are_counted(dtype: torch.dtype, places: set[int]) -> None:
    tensor = torch.ones(600_000, dtype=dtype)
    for number, place in enumerate(places):
        tensor[place] = (float("nan"), float("inf"), -float("inf"))[number % 3]
    assert count_not_finite(as_numpy(tensor.view(3, 200, 1000))) == len(places)


def test_large_finite_elements_are_not_counted_as_inf() -> None:
    assert count_not_finite(np.full(1000, 6e4, np.float16)) == 0
    assert count_not_finite(np.full(1000, 3e38, np.float32)) == 0
