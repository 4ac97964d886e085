"""Problems posed over arrays in memory, for `recompute_rows`, which asks of a dataset no more than to read rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import Arrays, problem_options

from oocattn.problem.arrays import ArraySpec
from oocattn.problem.problem import Problem, make_problem


class ArrayInMemory:
    """An array [B, H, N] or [B, H, N, D] that keeps the ranges of rows that were read."""

    direct, decode_bytes = True, 0

    def __init__(self, data: NDArray[Any]) -> None:
        self._data = data
        self.read: list[range] = []

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self.read.append(range(start, stop))
        out[...] = self._data[batch, head, start:stop]


def dataset_of(arrays: Arrays, bias: NDArray[np.float32] | None = None) -> Any:
    """The dataset of q, k and v, and of a key_bias."""
    found = dict(zip("qkv", map(ArrayInMemory, arrays), strict=True))
    if bias is not None:
        found["key_bias"] = ArrayInMemory(bias)
    return SimpleNamespace(arrays=found)


def problem_of(arrays: Arrays, bias: NDArray[np.float32] | None = None, **asked: Any) -> Problem:
    """The problem of q, k and v with what is asked of it."""
    specs = [ArraySpec(name, array.shape, array.dtype.name) for name, array in zip("qkv", arrays, strict=True)]
    key_bias = None if bias is None else ArraySpec("key_bias", bias.shape, bias.dtype.name)
    return make_problem(*specs, problem_options(**asked), key_bias)
