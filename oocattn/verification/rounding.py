"""What float32 arithmetic may lose in a row of attention.

The allowance of a row follows from its own numbers. The row is out = sum_j P_j v_j with P = softmax(s), and lse = log
sum_j exp(s_j). u is the unit roundoff of float32, 2^-24. No order of summation is assumed, because libraries differ in
it. To first order an error e_j of each score changes

    lse by sum_j P_j e_j    and    out by sum_j P_j e_j (v_j - out),

so a score counts as much as its key weighs. Rounding errors come in two kinds, which add up differently.

*Errors of one sign.* A dot product of D terms may be off by gamma_D sum|q k|, gamma_D = D u / (1 - D u) (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, section 3.1). A running sum that rises evenly, as that of constant rows
does, may be off by half of that. As far as the terms of a score have one sign, (D + 1) u / 2 times the excess max(0, 2 |s| -
sum|q k|) is allowed. Such errors C_j add up without cancellation: sum_j P_j (exp(C_j) - 1) |v_j - out|, bounded by Cauchy
and Schwarz. The same holds for sums over keys: there the largest excess of a partial sum counts, and the largest partial sum
as far as keys are repeated: where the same addends come again, so do their errors. Those of different addends vary: of c_i
keys that weigh P_i each, `SIGMAS` sqrt(sum_i (c_i P_i)^2) of the whole are of one sign. A common factor 1 + 2 u of all
scores (the scale is rounded, and so is log2(e) where a kernel takes powers of two) moves out along its derivative, sum_j P_j
s_j (v_j - out).

*Terms of the scores.* A softcap c multiplies the errors so far by the steepest rise of tanh(s / c) near s, which is 1 at
most, and adds `TANH` roundings of the capped score. A bias b (ALiBi's, or a key's) adds the rounding of b and of the sum.
Factors as above count as of one sign: 2 u |c tanh(s / c)| for that of s, 4 u |b| for that of b and for what the sum hides of
that of s. A learnable sink is a score without error that no value goes with.

*Errors that vary.* Other rounding errors behave as independent ones of mean 0 (Higham and Mary, SIAM J. Sci. Comput.
41:A2815, 2019). Their squares add up; that of a number x is at most u^2 x^2 / 3 in the mean. In a sum of D terms t in any
order, the squares of the partial sums add up to D (s^2 / 3 + sum t^2 / 6) in the mean. Equal keys have equal errors: the sum
of the squares of c such keys is c times as large. `SIGMAS` standard deviations are allowed. What exceeds the errors of
scores of a few units counts as of one sign, because keys that differ little may have nearly equal errors, too.

Libraries block sums over keys: a partial sum has hundreds of terms, whatever n is. The numbers of additions and the
factors of merges and exponentials in `allowance.py` were measured with torch on CPUs. Over thousands of random
problems of every kind, the largest float32 errors are 0.8 of what is allowed; on unit-normal inputs, the median
allowance is 5 to 11 times the median error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from oocattn.verification.error_sums import ErrorSums
from oocattn.verification.products import dot, multiply, weigh

Array64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
"""The smallest number of each dtype: below it, rounding is absolute."""

LARGEST = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": 2.0**128 - 2.0**104}
"""The largest finite number of each dtype."""

UNIT = UNIT_ROUNDOFF["float32"]

VARIANCE = 1 / 3  # the mean square of the rounding error of x, at most, in units of (u x)^2
SIGMAS = 4.0  # standard deviations that are allowed of errors that vary
FEW_WEIGHTS = 1.2
"""Where a few weights make up a row, their rounding is less even: 1.15 was the most in 11,520 rows of cuDNN's and
FlashAttention's calls on problems of every kind (H200)."""

TANH = 3.0  # of a capped score, in units of u: of tanh, its argument and its factor, as one rounding error
MATRIX_UNITS = 1e-5  # of lse: what matrix units that truncate sums and approximate powers of two may lose besides
OVERFLOW = 2.0**119
"""Sums of values as large as this may overflow float32, with weights that a kernel has raised by up to 2^8."""

SCORE_OVERFLOW = 2.0**126
"""Sums of products of a query and a key as large as this may overflow float32, before they are scaled."""

CHANCE = 10.0  # how many times as large as it is a row may count, where it is small by chance
LARGE = 0.25  # an error of a score that is not small: first-order analysis ends
REPEATED = 4  # occurrences of a key up to which sums over keys count as sums of different terms
_MOST_RAISED = 200.0  # of an exponent, above the largest score of a tile: neither sums nor their products overflow


def least_length(dtype: str, columns: int) -> float:
    """The norm to which errors of shorter rows are relative: 200 roundings of numbers that are subnormal in their dtype."""
    return 200 * subnormal_rounding(dtype, columns)


def subnormal_rounding(dtype: str, columns: int) -> float:
    """What rounding to subnormal numbers may change of a row, as a norm."""
    return SMALLEST[dtype] / 2 * math.sqrt(columns)


def see_sinks(sums: ErrorSums, sinks: Array64) -> None:
    """Take the learnable sinks [rows]: scores of weight 1 that no value goes with."""
    sums.slope += sinks
    sums.random.total += VARIANCE * 2 * UNIT**2


class TileErrors:
    """Collects, of one tile of keys, what the allowance of some rows of one head group follows from: `sums`.

    In this order come the products (`see_products`), the terms of the scores as they are applied (`see_cap`, `see_bias`),
    the scores, the weights and the values. `weight_roundoff` is that of the dtype that softmax weights were rounded to. What
    is known of each score lies in three `buffers` [rows, n].
    """

    def __init__(
        self, query: Array64, scale: float, value_dim: int, weight_roundoff: float, buffers: Sequence[Array64]
    ) -> None:
        rows, self._head_dim = query.shape
        self._scale, self._query = scale, query
        self._errors, self._variances, self._scratch = buffers
        self._overflow: Mask | None = None
        self._hidden: Mask | None = None
        self._finite = False
        self.sums = ErrorSums(rows, value_dim, weight_roundoff > UNIT)

    def see_products(self, key: Array64, occurrences: Array64, scores: Array64, hidden: Mask | None) -> None:
        """Take the keys [n, D], which are overwritten, and their products with the queries, scaled: `scores` [rows, n].

        `occurrences` [n] says which occurrence of itself each key is. Rows attend all of the keys but those that are
        `hidden` [rows, n].
        """
        self._coherence = 2 * occurrences - 1  # of c equal keys, these sum up to c^2
        error, variance, sizes = self._errors, self._variances, self._scratch
        multiply(np.abs(self._query), np.abs(key, out=key), out=sizes)
        sizes *= self._scale
        multiply(self._query * self._query, np.multiply(key, key, out=key), out=variance)
        np.abs(scores, out=error)
        self._hidden, masked = hidden, hidden
        if not (np.isfinite(error.max(initial=0.0)) and np.isfinite(sizes.max(initial=0.0))):
            masked = ~(np.isfinite(error) & np.isfinite(sizes))
            if hidden is not None:
                masked |= hidden
        if masked is not None:
            for array in (error, variance, sizes):
                np.copyto(array, 0.0, where=masked)
        self._overflow = self._see_sums(scores, sizes, masked)
        variance *= (self._head_dim / 6 + 2) * self._scale**2  # + 2: each product is rounded, and so is the scaled query
        variance += error * error * (self._head_dim / 3)
        variance *= VARIANCE * UNIT**2
        error *= 2
        error -= sizes
        np.maximum(error, 0.0, out=error)
        error *= UNIT * (self._head_dim + 1) / 2

    def see_cap(self, scores: Array64, softcap: float) -> None:
        """Take the scores [rows, n] before they are capped: what they are off counts as steeply as tanh rises near them."""
        error, variance, rise = self._errors, self._variances, self._scratch
        np.abs(scores, out=rise)
        rise -= error + SIGMAS * np.sqrt(variance)
        np.maximum(rise, 0.0, out=rise)
        rise /= softcap
        np.tanh(rise, out=rise)
        np.multiply(rise, -rise, out=rise)
        rise += 1
        error *= rise
        rise *= rise
        variance *= rise
        np.divide(scores, softcap, out=rise)
        np.tanh(rise, out=rise)
        np.abs(rise, out=rise)
        rise *= UNIT * softcap
        error += 2 * rise + SMALLEST["float32"] * softcap
        rise *= rise
        variance += VARIANCE * TANH**2 * rise

    def see_bias(self, bias: Array64, scores: Array64) -> None:
        """Take a term [rows, n], and the scores that it has been added to."""
        self._see_overflow(bias)
        error, variance, scratch = self._errors, self._variances, self._scratch
        np.abs(bias, out=scratch)
        error += 4 * UNIT * scratch
        scratch *= scratch
        scratch += scores * scores
        variance += VARIANCE * UNIT**2 * scratch

    def see_scores(self, scores: Array64) -> None:
        """Take the scores [rows, n], with all terms, -inf where masked."""
        error, variance, cut = self._errors, self._variances, self._scratch
        self._finite = bool(np.isfinite(scores.min(initial=0.0)) and np.isfinite(scores.max(initial=0.0)))
        if not self._finite:
            masked = ~np.isfinite(scores)
            for array in (error, variance):
                np.copyto(array, 0.0, where=masked)
            del masked
        np.sqrt(variance, out=variance)
        variance *= SIGMAS
        error += variance
        self.sums.largest_error = error.max(axis=1)
        if self._overflow is not None:
            self.sums.lost = np.where(self._overflow, scores + error, -np.inf).max(axis=1)
        if self.sums.largest_error.max() > LARGE:
            self.sums.reach = np.where(error > LARGE, scores + error, -np.inf).max(axis=1)
        np.minimum(error, 4 * SIGMAS * UNIT * math.sqrt(VARIANCE * self._head_dim), out=cut)  # of which all counts as random
        error -= cut
        cut /= SIGMAS
        np.multiply(cut, cut, out=variance)

    def _see_sums(self, scores: Array64, sizes: Array64, masked: Mask | None) -> Mask | None:
        """Take sum|q k| of each score; return which may overflow to -Inf. Their keys would weigh nothing."""
        largest = SCORE_OVERFLOW * min(1.0, self._scale)
        if sizes.max(initial=0.0) <= largest:
            return None
        scores = scores if masked is None else np.where(masked, 0.0, scores)
        np.maximum(self.sums.largest_sum, (sizes + scores).max(axis=1) / 2 / largest, out=self.sums.largest_sum)
        overflow: Mask = (sizes - scores) / 2 > largest
        return overflow

    def _see_overflow(self, bias: Array64) -> None:
        """Take terms that may overflow."""
        large = np.broadcast_to((np.abs(bias) > SCORE_OVERFLOW) & np.isfinite(bias), self._errors.shape)
        if self._hidden is not None:
            large = large & ~self._hidden
        self.sums.largest_sum[(large & (bias > 0)).any(axis=1)] = np.inf
        overflow = large & (bias < 0)
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    def see_weights(self, scores: Array64, weights: Array64, shift: Array64) -> None:
        """Take the weights exp(scores - shift)."""
        self.sums.repeated += dot(weights, (self._coherence > 2 * REPEATED).astype(np.float64))
        error, variance, scratch = self._errors, self._variances, self._scratch
        error += scores
        error -= shift[:, None]
        np.minimum(error, _MOST_RAISED, out=error)
        np.exp(error, out=error)
        error -= weights
        self.sums.spread += np.einsum("mn,mn->m", weights, np.sqrt(variance, out=scratch))
        variance += VARIANCE * 2 * UNIT**2  # of exp, and of its argument
        variance *= self._coherence
        variance *= weights
        variance *= weights
        np.multiply(weights, scores, out=scratch)
        if not self._finite:
            np.copyto(scratch, 0.0, where=~np.isfinite(scratch))

    def see_values(self, weights: Array64, value: Array64, lengths: Array64, hidden: Mask | None) -> None:
        """Take the values [n, Dv], all finite. Rows attend all of them but those that are `hidden` [rows, n]."""
        sums, squares = self.sums, lengths * lengths
        sums.square_of_values += dot(weights, squares)
        sums.systematic.add(self._errors, value, squares)
        sums.random.add(self._variances, value, squares)
        if sums.rounded is not None:
            of_weights = self._errors  # used up
            np.multiply(weights, weights, out=of_weights)
            sums.by_chance += dot(of_weights, squares)
            of_weights *= self._coherence
            sums.rounded.add(of_weights, value, squares)
        sums.slope += self._scratch.sum(axis=1)
        sums.slope_vector += weigh(self._scratch, value)
        largest = np.broadcast_to(lengths.max(initial=0.0), len(weights))
        if hidden is not None:
            attended = self._scratch  # used up
            np.copyto(attended, lengths)
            np.copyto(attended, 0.0, where=hidden)
            largest = attended.max(axis=1)
        np.maximum(sums.largest_value, largest, out=sums.largest_value)
