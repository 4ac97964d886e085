"""A second pass over the pairs of a result: what is asked of it, and the sign vectors that prove `out`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt

from oocattn.records import OMITTED, Count
from oocattn.units import ceil_div

LSE = "lse"
"""The name of the input that has the log-sum-exp of each row that is asked for."""

VECTORS = 8
"""Sign vectors of a proof. A difference of `out` that is as large as the noise escapes one with a probability of 68%."""

_NUMBERS = {"received": 0, "entropy": 0, "top_keys": 1, "pooled": 4}
"""How many numbers each reduction is asked for with."""

ARRAYS = tuple(_NUMBERS)
"""What a survey may be asked for; the weights of the top keys come with these."""

MOST_TOP, MOST_POOLS = 128, 4096
"""Keys of each row that it keeps, and blocks along a side of its map, at most."""

SAMPLED_POOLS = 1024
"""Blocks along a side of the map of rows and keys that a kernel is timed on, at most: their sums take 16 MiB on a GPU."""


@dataclass(frozen=True)
class Reduced:
    """A reduction of the weights that is asked for: its name, its numbers, and how many it has of each row in the state."""

    name: str
    numbers: tuple[Count, ...] = ()
    columns: Count = 0

    def __post_init__(self) -> None:
        if len(self.numbers) != _NUMBERS.get(self.name) or 0 in self.numbers[:2]:  # the sizes of what it keeps
            raise ValueError(f"no reduction {self.name!r:.40} of numbers {list(self.numbers)!s:.80}")

    def of_sample(self, rows: int, keys: int) -> Reduced:
        """See `SecondPass.of_sample`."""
        if self.name != "pooled":
            return self
        row_block, key_block, *_ = self.numbers
        row_block, key_block = (
            max(block, ceil_div(count, SAMPLED_POOLS)) for block, count in ((row_block, rows), (key_block, keys))
        )
        return Reduced(self.name, (row_block, key_block, 0, ceil_div(keys, key_block)))


@dataclass(frozen=True)
class SecondPass:
    """The weights of a result, P_ij = exp(s_ij - lse_i), once more, where the log-sum-exp of each row is known.

    With a `seed` it proves the result: its `out` is P (V R), which the first result's `out` times R must be, with a random
    sign vector in each column of R [value_dim, VECTORS] (`sign_vectors` of `seed`). Source: Freivalds, "Fast probabilistic
    algorithms", MFCS 1979. Or the weights are `reduced`, without values, and `out` has the columns of all reductions.
    `lse` is log(sum_j P_ij), which must be 0, or with a learnable sink log(1 - exp(sink - lse_i)).
    """

    seed: Annotated[Count | None, OMITTED] = None
    reduced: Annotated[tuple[Reduced, ...] | None, OMITTED] = None

    @property
    def columns(self) -> int:
        """Columns of its `out`: at least one."""
        return VECTORS if self.reduced is None else max(1, sum(each.columns for each in self.reduced))

    @property
    def has_sums(self) -> bool:
        """Whether it sums over rows, and so keeps sums of every block of pairs."""
        return any(not each.columns for each in self.reduced or ())

    def of_sample(self, rows: int, keys: int) -> SecondPass:
        """The same of so many rows and keys by themselves, counted from 0, of which the pools take little memory."""
        if self.reduced is None:
            return self
        return SecondPass(reduced=tuple(each.of_sample(rows, keys) for each in self.reduced))

    @property
    def has_values(self) -> bool:
        """Whether it reads v."""
        return self.reduced is None


def sign_vectors(seed: int, value_dim: int) -> npt.NDArray[np.float32]:
    """Random signs [value_dim, VECTORS], float32, the same for a seed wherever they are drawn."""
    raw = np.random.Philox(key=seed).random_raw(value_dim * VECTORS)  # numbers of numpy's distributions may change
    return np.where(raw >> np.uint64(63), np.float32(1), np.float32(-1)).reshape(value_dim, VECTORS)
