"""What float32 may lose in rows, from the sums over their keys. `rounding.py` says how that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.verification.error_sums import ErrorSums, PartialSums
from oocattn.verification.rounding import FEW_WEIGHTS, MATRIX_UNITS, OVERFLOW, SIGMAS, SMALLEST, UNIT, VARIANCE

Array64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Allowance:
    """What float32 may lose in rows, both [rows] and absolute; `out` is a norm over Dv."""

    out: Array64
    lse: Array64


class Allowances:
    """The allowances of rows whose keys and partial sums had these errors.

    `weight_roundoff` is that of the dtype that softmax weights were rounded to.
    """

    def __init__(self, errors: ErrorSums, partials: PartialSums, weight_roundoff: float) -> None:
        self._errors, self._partials, self._weight_roundoff = errors, partials, weight_roundoff
        self._value_dim = errors.slope_vector.shape[1]

    def of(
        self,
        out: Array64,
        lse: Array64,
        maximum: Array64,
        den: Array64,
        share: Array64,
        size: Array64,
        keys: npt.NDArray[np.int64],
    ) -> Allowance:
        """The allowance of rows with these exact results.

        Given are `out` [rows, Dv], lse, largest scores, sums of weights, the share of these that a sink does not take, sizes
        of values and numbers of keys. Nothing is lost of a row without a key, or whose scores are all -Inf, of `out` also
        where all are so far below a sink: its weights are 0 in any arithmetic.
        """
        errors = self._errors
        empty, keys = np.isneginf(maximum), np.maximum(keys, 1)
        out, lse, rise = (np.where(np.isfinite(array), array, 0.0) for array in (out, lse, lse - maximum))
        den = np.where(den > 0, den, 1.0)
        matter = lse - 10 - np.log(keys)  # from such a score on, together
        unknown = errors.reach > matter  # keys that matter have errors that are not small
        steady = np.where(unknown, errors.largest_error, errors.systematic.total / den)
        of_out, of_lse = self._of_out(out, lse, den, share, size, keys), self._of_lse(lse, rise, den, steady, keys)
        # `out` is a mean of values, of which a sink takes a part, as far as that is known.
        anything = 1.01 * (np.linalg.norm(out, axis=1) + np.where(unknown, 1.0, share) * errors.largest_value)
        of_out = np.minimum(np.where(unknown, np.inf, of_out), anything)
        overflows = (errors.largest_sum > 1) | (errors.lost > matter) | (size > OVERFLOW)
        of_out, of_lse = (np.where(overflows, np.inf, allowed) for allowed in (of_out, of_lse))
        of_out = np.where(empty | ((share == 0) & ~overflows & ~unknown), 0.0, of_out)
        of_lse = np.where(empty, 0.0, of_lse)
        return Allowance(np.where(np.isnan(of_out), 0.0, of_out), np.where(np.isnan(of_lse), 0.0, of_lse))  # of rows of NaN

    def _of_out(
        self, out: Array64, lse: Array64, den: Array64, share: Array64, size: Array64, keys: npt.NDArray[np.int64]
    ) -> Array64:
        errors, partials, length = self._errors, self._partials, np.linalg.norm(out, axis=1)
        about = np.maximum(errors.square_of_values / den - (2 - share) * length**2, 0.0)  # the sum of P_j |v_j - out|^2
        deviation = UNIT * math.sqrt(VARIANCE)
        partial = np.sqrt(partials.moments.square / keys)
        if self._value_dim == 1:  # the product with one column is a dot product, whose lanes add up keys that lie apart
            partial = np.maximum(partial, size)
        varying = [
            np.sqrt(errors.random.about(out)) / den,
            deviation * np.sqrt(np.minimum(keys, 128 + keys / 128)) * partial / den,
            2 * deviation * (np.abs(lse) + 2) * np.sqrt(partials.moments.about(out) / keys) / den,  # merges of whole spans
        ]
        # At least the root of the sum of squares of what equal keys weigh together.
        together = np.sqrt(errors.random.total / (2 * VARIANCE)) / UNIT
        one_sign = np.maximum(partials.drift, np.minimum(errors.repeated, SIGMAS * together) * partials.peak / den)
        steady = [
            np.sqrt(errors.systematic.total * errors.systematic.about(out)) / den,
            2 * UNIT * np.linalg.norm(errors.slope_vector - out * errors.slope[:, None], axis=1) / den,
            UNIT / 2 * np.sqrt(share * about),  # of exp with its value
            UNIT / 2 * np.minimum(keys, 256 + keys / 256) * one_sign / den,
            2 * UNIT * length,
            keys * (SMALLEST["float32"] * math.sqrt(self._value_dim) + 2.0**-126 * errors.largest_value),  # underflow
        ]
        if errors.rounded is not None:  # weights one by one, or all alike where they are equal; partial results of libraries
            rounded = [np.sqrt(errors.rounded.about(out)) / den, length, partial / den]
            spread = math.sqrt(VARIANCE / 2) * (1 + SIGMAS / math.sqrt(2 * self._value_dim))  # of a norm over Dv elements
            most = np.maximum(FEW_WEIGHTS * spread * np.linalg.norm(rounded, axis=0), partials.drift / den)
            steady.append(self._weight_roundoff * most)
        allowed: Array64 = np.sum(steady, axis=0) + SIGMAS * np.linalg.norm(varying, axis=0)
        return allowed

    def _of_lse(self, lse: Array64, rise: Array64, den: Array64, steady: Array64, keys: npt.NDArray[np.int64]) -> Array64:
        errors, of_den = self._errors, UNIT * np.sqrt(VARIANCE / 3 * np.minimum(keys, 16 + keys / 512))
        varying = np.sqrt(errors.random.total / den**2 + of_den**2)
        steady = steady + 2 * UNIT * np.abs(errors.slope) / den + (UNIT if errors.rounded is None else MATRIX_UNITS)
        steady += errors.spread / den  # a standard deviation that all keys share, as where they are nearly equal
        return 1.5 * half_spacing(lse) + half_spacing(rise) + steady + SIGMAS * varying


def half_spacing(numbers: Array64) -> Array64:
    """The largest error of rounding numbers of such a size to float32."""
    _, exponent = np.frexp(np.maximum(np.abs(numbers), 2.0**-100))
    spacing: Array64 = np.ldexp(UNIT, exponent - 1)
    return spacing
