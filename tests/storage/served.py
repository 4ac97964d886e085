"""A dataset that is served, and its reading back."""

from __future__ import annotations

import numpy as np
from support import normal_arrays

from oocattn.storage.inputs.dataset import Dataset

ARRAYS = normal_arrays(64)


def read(dataset: Dataset) -> None:
    """Compare all rows with what was written."""
    dataset.check_complete()
    for array, data in zip(dataset.arrays.values(), ARRAYS, strict=True):
        out = np.empty(data.shape[2:], array.dtype)
        for head in range(data.shape[1]):
            array.read_rows(0, head, 0, 64, out)
            np.testing.assert_array_equal(out, data[0, head])
