"""A second pass over the pairs of a result: what is asked of it, and the sign vectors that prove `out`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.records import Count

LSE = "lse"
"""The name of the input that has the log-sum-exp of each row that is asked for."""

VECTORS = 8
"""Sign vectors of a proof. A difference of `out` that is as large as the noise escapes one with a probability of 68%."""


@dataclass(frozen=True)
class SecondPass:
    """The weights of a result, P_ij = exp(s_ij - lse_i), once more, where the log-sum-exp of each row is known.

    Its `out` is P (V R), which the first result's `out` times R must be, with a random sign vector in each column of R
    [value_dim, VECTORS] (`sign_vectors` of `seed`). Its `lse` is log(sum_j P_ij), which must be 0, or with a learnable sink
    log(1 - exp(sink - lse_i)). Source: Freivalds, "Fast probabilistic algorithms", MFCS 1979.
    """

    seed: Count

    @property
    def columns(self) -> int:
        """Columns of its `out`."""
        return VECTORS


def sign_vectors(seed: int, value_dim: int) -> npt.NDArray[np.float32]:
    """Random signs [value_dim, VECTORS], float32, the same for a seed wherever they are drawn."""
    raw = np.random.Philox(key=seed).random_raw(value_dim * VECTORS)  # numbers of numpy's distributions may change
    return np.where(raw >> np.uint64(63), np.float32(1), np.float32(-1)).reshape(value_dim, VECTORS)
