"""How far a right result and a second pass over its pairs may differ, row by row, as standard deviations of rounding.

A row of the result has `out` and lse; the pass has p_k for out . r_k, with sign vectors r_k, and the sum S of the weights
exp(s_j - lse). Both lose something: the result rounds `out` to its dtype, and weights where its kernel does, and both have
scores and sums in float32. Signs are random: errors of the elements of `out` add up as squares. A row is looked at again
where the two differ by more than `SUSPICIOUS` deviations, so that these need not be bounds as those of `rounding.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.verification.attended import Int64s
from oocattn.verification.rounding import SMALLEST, TANH, UNIT, UNIT_ROUNDOFF, VARIANCE

Array64 = npt.NDArray[np.float64]

SUSPICIOUS = 6.0
"""Standard deviations beyond which a row is looked at again: of a billion normal numbers, two are beyond."""

APPROXIMATE = 2.0**-20  # relative: what matrix units lose besides, which truncate sums and approximate powers of two
_NO_WEIGHT = 20.0  # below the log-sum-exp, and by the logarithm of the number of keys: such scores weigh nothing

MANTISSA = {"float16": 10, "bfloat16": 7, "float32": 23}
"""Bits of the mantissa of each dtype, beside the one that is not stored."""


@dataclass(frozen=True)
class KeyTerms:
    """Of the keys that a head attends: the norm of the longest, the largest size of a bias, the mean square of a value.

    `shut` counts the keys before each, and before the end, whose bias is -inf: int64 [keys + 1]; None where no bias is.
    """

    longest: float
    value_square: float
    bias: float
    shut: Int64s | None


@dataclass(frozen=True)
class QueryTerms:
    """Of some rows of a head, all [rows]: the norm of q, lse, and the size of the largest ALiBi bias.

    `sink` is the size of the head's learnable sink, 0 where it has none.
    """

    norm: Array64
    lse: Array64
    alibi: Array64
    sink: float = 0.0


@dataclass(frozen=True)
class WeightNoise:
    """What rounding of softmax weights adds: to the variance of `out`, relative, and to the deviation of their sum."""

    variance: float
    relative: float

    @classmethod
    def of(cls, problem: Problem, rounding: bool, pass_rounding: bool) -> WeightNoise:
        """Of a result whose kernel rounds weights to the dtype of the inputs, or does not, and of the pass's.

        A pass that rounds has weights and projected values of float16, with one error each.
        """
        result, other = (UNIT_ROUNDOFF[problem.dtype] * rounding) ** 2, 2 * (UNIT_ROUNDOFF["float16"] * pass_rounding) ** 2
        return cls(VARIANCE * (result + other), (rounding or pass_rounding) * APPROXIMATE)


def relative_noise(problem: Problem, rows: QueryTerms, keys: KeyTerms) -> Array64:
    """The deviation of a sum of weights by the arithmetic of float32, relative: [rows].

    A score errs by some roundings of a product of norms and of its terms, and lse by its own. Biases count up to where the
    score weighs nothing, however small it is.
    """
    products = problem.scale * rows.norm * keys.longest
    size = products
    if problem.softcap is not None:
        capped = np.minimum(products, problem.softcap)
        size = products + TANH * capped
        products = capped
    bias = rows.alibi + keys.bias
    # The lse that the result says may be anything: no more of it counts than the row can have.
    largest = np.maximum(products + bias + math.log(problem.keys), rows.sink)
    lse = np.minimum(np.abs(rows.lse), largest)
    size = size + np.minimum(bias, products + lse + math.log(problem.keys) + _NO_WEIGHT)
    found: Array64 = UNIT * (4 + 2 * lse + size)
    return found


def rounding_variance(out: npt.NDArray[np.generic]) -> Array64:
    """The variance of the errors by which `out` [rows, Dv] is rounded to its dtype, summed over elements: [rows]."""
    fields = out.view(f"u{out.itemsize}") >> MANTISSA[out.dtype.name]
    fields &= (1 << _exponent_bits(out.dtype.name)) - 1
    found: Array64 = _variances(out.dtype.name)[fields].sum(axis=1)
    return found


def _exponent_bits(dtype: str) -> int:
    return 5 if dtype == "float16" else 8


@cache
def _variances(dtype: str) -> Array64:
    """The variance of the rounding error of a number, by the field of its exponent; subnormal numbers have field 0."""
    fields = np.arange(1 << _exponent_bits(dtype))
    spacing = SMALLEST[dtype] * 2.0 ** (np.maximum(fields, 1) - 1)
    found: Array64 = spacing**2 / 12
    return found


class Quantiles:
    """Quantiles of many positive numbers, counted by size: an upper bound at most a tenth too large."""

    _STEPS = 8  # of a factor of two
    _LEAST, _MOST = -60, 60  # powers of two

    def __init__(self) -> None:
        self._counts = np.zeros((self._MOST - self._LEAST) * self._STEPS + 1, np.int64)

    def add(self, numbers: Array64) -> None:
        """Count numbers, which are 0 or more, or Inf."""
        with np.errstate(divide="ignore"):
            places = np.ceil((np.log2(numbers) - self._LEAST) * self._STEPS)
        self._counts += np.bincount(places.clip(0, len(self._counts) - 1).astype(np.int64), minlength=len(self._counts))

    def merge(self, other: Quantiles) -> None:
        """Count what another has counted."""
        self._counts += other._counts

    def at(self, share: float) -> float:
        """A number that this share of all is not larger than; 0 where there are none."""
        total = int(self._counts.sum())
        if not total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._counts), share * total))
        return 2.0 ** (self._LEAST + place / self._STEPS) if place < len(self._counts) - 1 else math.inf
