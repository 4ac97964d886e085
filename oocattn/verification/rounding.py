"""What float32 arithmetic may lose in a row of attention.

The allowance of a row follows from its own numbers. The row is out = sum_j P_j v_j with P = softmax(s), and lse = log
sum_j exp(s_j). u is the unit roundoff of float32, 2^-24. No order of summation is assumed, because libraries differ in
it. To first order an error e_j of each score changes

    lse by sum_j P_j e_j    and    out by sum_j P_j e_j (v_j - out),

so a score counts as much as its key weighs. Rounding errors come in two kinds, which add up differently.

*Errors of one sign.* A dot product of D terms may be off by gamma_D sum|q k|, gamma_D = D u / (1 - D u) (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, section 3.1). A running sum that rises evenly, as that of constant rows
does, may be off by half of that. As far as the terms of a score have one sign, (D + 1) u / 2 times the excess
max(0, 2 |s| - sum|q k|) is allowed. Such errors C_j add up without cancellation: sum_j P_j (exp(C_j) - 1) |v_j - out|,
bounded by Cauchy and Schwarz. The same holds for sums over keys: there the largest excess of a partial sum counts, and the
largest partial sum as far as keys are repeated. A common factor 1 + 2 u of all scores (the scale is rounded, and so is
log2(e) where a kernel takes powers of two) moves out along its derivative, sum_j P_j s_j (v_j - out).

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
factors of merges and exponentials in `_of_out` and `_of_lse` were measured with torch on CPUs. Over thousands of random
problems of every kind, the largest float32 errors are 0.8 of what is allowed; on unit-normal inputs, the median
allowance is 5 to 11 times the median error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.verification.products import multiply, weigh
from oocattn.verification.repeats import Repeats

Array64 = npt.NDArray[np.float64]

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

LARGE = 0.25  # an error of a score that is not small: first-order analysis ends
REPEATED = 4  # occurrences of a key up to which sums over keys count as sums of different terms
_MOST_RAISED = 30.0  # of an exponent, so that nothing overflows


@dataclass(frozen=True)
class Allowance:
    """What float32 may lose in rows, both [rows] and absolute; `out` is a norm over Dv."""

    out: Array64
    lse: Array64


class _Moments:
    """Sums over keys of x_j, of x_j v_j and of x_j |v_j|^2, for some rows."""

    def __init__(self, rows: int, value_dim: int) -> None:
        self.total, self.square = np.zeros(rows), np.zeros(rows)
        self.vector = np.zeros((rows, value_dim))

    def scale(self, factor: Array64) -> None:
        self.total *= factor
        self.square *= factor
        self.vector *= factor[:, None]

    def add(self, weights: Array64, value: Array64, squares: Array64) -> None:
        self.total += weights.sum(axis=1)
        self.square += np.vecdot(weights, squares)
        self.vector += weigh(weights, value)

    def about(self, out: Array64) -> Array64:
        """The sum of x_j |v_j - out|^2."""
        cross = np.einsum("md,md->m", out, self.vector)
        found: Array64 = np.maximum(self.square - 2 * cross + self.total * np.einsum("md,md->m", out, out), 0.0)
        return found


class RoundingErrors:
    """Collects, key by key, what the allowance of some rows of one head group follows from.

    Of each tile of keys come, in this order: the products (`see_products`), the terms of the scores as they are applied
    (`see_cap`, `see_bias`), the scores, the weights and the values. `weight_roundoff` is that of the dtype that softmax
    weights were rounded to.
    """

    def __init__(
        self, query: Array64, scale: float, value_dim: int, keys: int, key_rows: int, weight_roundoff: float = UNIT
    ) -> None:
        rows, head_dim = query.shape
        self._head_dim, self._value_dim, self._scale, self._weight_roundoff = head_dim, value_dim, scale, weight_roundoff
        self._sizes_of_query, self._squares_of_query = np.abs(query), query * query
        self._systematic, self._random, self._partials = (_Moments(rows, value_dim) for _ in range(3))
        self._slope, self._slope_vector = np.zeros(rows), np.zeros((rows, value_dim))
        self._rounded = _Moments(rows, value_dim) if weight_roundoff > UNIT else None
        self._largest_value, self._square_of_values, self._spread = (np.zeros(rows) for _ in range(3))
        self._drift, self._peak, self._repeated = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self._largest_sum, self._largest_error = np.zeros(rows), np.zeros(rows)
        self._reach, self._lost = np.full(rows, -np.inf), np.full(rows, -np.inf)
        self._repeats = Repeats(keys, head_dim)
        self._buffers = [np.empty(rows * key_rows) for _ in range(3)]
        self._overflow: npt.NDArray[np.bool_] | None = None

    def see_sinks(self, sinks: Array64) -> None:
        """Take the learnable sinks [rows], before any key: scores of weight 1 that no value goes with."""
        self._slope += sinks
        self._random.total += VARIANCE * 2 * UNIT**2

    def see_products(self, key: Array64, scores: Array64, hidden: npt.NDArray[np.bool_] | None) -> None:
        """Take the keys [n, D], which are overwritten, and their products with the queries, scaled: `scores` [rows, n].

        Rows attend all of the keys but those that are `hidden` [rows, n].
        """
        self._coherence = 2 * self._repeats.count(key) - 1  # of c equal keys, these sum up to c^2
        error, variance, sizes = self._errors, self._variances, self._scratch = [
            buffer[: scores.size].reshape(scores.shape) for buffer in self._buffers
        ]
        multiply(self._sizes_of_query, np.abs(key, out=key), out=sizes)
        sizes *= self._scale
        multiply(self._squares_of_query, np.multiply(key, key, out=key), out=variance)
        np.abs(scores, out=error)
        masked = ~(np.isfinite(error) & np.isfinite(sizes))
        self._hidden = np.broadcast_to(False, scores.shape) if hidden is None else hidden
        masked |= self._hidden
        for array in (error, variance, sizes):
            np.copyto(array, 0.0, where=masked)
        self._overflow = self._see_sums(scores, sizes, masked)
        del masked
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
        rise -= self._off()
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
        masked = ~np.isfinite(scores)
        for array in (error, variance):
            np.copyto(array, 0.0, where=masked)
        del masked
        error[...] = self._off()
        np.maximum(self._largest_error, error.max(axis=1), out=self._largest_error)
        if self._overflow is not None:
            np.maximum(self._lost, np.where(self._overflow, scores + error, -np.inf).max(axis=1), out=self._lost)
        if self._largest_error.max() > LARGE:
            reach = np.where(error > LARGE, scores + error, -np.inf).max(axis=1)
            np.maximum(self._reach, reach, out=self._reach)
        np.minimum(error, 4 * SIGMAS * UNIT * math.sqrt(VARIANCE * self._head_dim), out=cut)  # of which all counts as random
        error -= cut
        cut /= SIGMAS
        np.multiply(cut, cut, out=variance)

    def _off(self) -> Array64:
        """All that each score may be off."""
        off: Array64 = self._errors + SIGMAS * np.sqrt(self._variances)
        return off

    def _see_sums(self, scores: Array64, sizes: Array64, masked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
        """Take sum|q k| of each score; return which may overflow to -Inf. Their keys would weigh nothing."""
        largest = SCORE_OVERFLOW * min(1.0, self._scale)
        if sizes.max(initial=0.0) <= largest:
            return None
        scores = np.where(masked, 0.0, scores)
        np.maximum(self._largest_sum, (sizes + scores).max(axis=1) / 2 / largest, out=self._largest_sum)
        overflow: npt.NDArray[np.bool_] = (sizes - scores) / 2 > largest
        return overflow

    def _see_overflow(self, bias: Array64) -> None:
        """Take terms that may overflow."""
        large = (np.abs(bias) > SCORE_OVERFLOW) & np.isfinite(bias) & ~self._hidden
        self._largest_sum[(large & (bias > 0)).any(axis=1)] = np.inf
        overflow = large & (bias < 0)
        self._overflow = overflow if self._overflow is None else self._overflow | overflow

    def see_weights(self, scores: Array64, weights: Array64, shift: Array64, kept: Array64) -> None:
        """Take the weights exp(scores - shift); earlier sums keep the share `kept`."""
        for array in (self._slope, self._drift, self._peak, self._repeated, self._square_of_values, self._spread):
            array *= kept
        self._slope_vector *= kept[:, None]
        self._systematic.scale(kept)
        for moments in filter(None, (self._random, self._partials, self._rounded)):
            moments.scale(kept * kept)
        self._repeated += np.vecdot(weights, (self._coherence > 2 * REPEATED).astype(np.float64))
        error, variance, scratch = self._errors, self._variances, self._scratch
        error += scores
        error -= shift[:, None]
        np.minimum(error, _MOST_RAISED, out=error)
        np.exp(error, out=error)
        error -= weights
        self._spread += np.einsum("mn,mn->m", weights, np.sqrt(variance, out=scratch))
        variance += VARIANCE * 2 * UNIT**2  # of exp, and of its argument
        variance *= self._coherence
        variance *= weights
        variance *= weights
        np.multiply(weights, scores, out=scratch)
        np.copyto(scratch, 0.0, where=~np.isfinite(scratch))

    def see_values(self, weights: Array64, value: Array64, lengths: Array64, hidden: npt.NDArray[np.bool_] | None) -> None:
        """Take the values [n, Dv], all finite. Rows attend all of them but those that are `hidden` [rows, n]."""
        squares = lengths * lengths
        self._square_of_values += np.vecdot(weights, squares)
        self._systematic.add(self._errors, value, squares)
        self._random.add(self._variances, value, squares)
        if self._rounded is not None:
            self._rounded.add(self._coherence * weights * weights, value, squares)
        self._slope += self._scratch.sum(axis=1)
        self._slope_vector += weigh(self._scratch, value)
        attended = self._scratch  # used up
        np.copyto(attended, lengths)
        if hidden is not None:
            np.copyto(attended, 0.0, where=hidden)
        np.maximum(self._largest_value, attended.max(axis=1), out=self._largest_value)

    def see_partial_sum(self, num: Array64, size: Array64, den: Array64, keys: npt.NDArray[np.int64]) -> None:
        """Take the present sums: of weight times value, of weight times |value|, of weights. They stand for so many keys."""
        squares = np.einsum("md,md->m", num, num)
        self._partials.total += keys * den * den
        self._partials.vector += (keys * den)[:, None] * num
        self._partials.square += keys * squares
        np.maximum(self._peak, np.sqrt(squares), out=self._peak)
        np.maximum(self._drift, 2 * np.sqrt(squares) - size, out=self._drift)

    def allowance(
        self, out: Array64, lse: Array64, maximum: Array64, den: Array64, size: Array64, keys: npt.NDArray[np.int64]
    ) -> Allowance:
        """The allowance of rows with these exact results.

        Given are `out` [rows, Dv], lse, largest scores, sums and numbers of keys. Nothing is lost of a row without a key, or
        whose scores are all -Inf: its weights are 0 in any arithmetic.
        """
        empty, keys = np.isneginf(maximum), np.maximum(keys, 1)
        out, lse, rise = (np.where(np.isfinite(array), array, 0.0) for array in (out, lse, lse - maximum))
        den = np.where(den > 0, den, 1.0)
        matter = lse - 10 - np.log(keys)  # from such a score on, together
        unknown = self._reach > matter  # keys that matter have errors that are not small
        steady = np.where(unknown, self._largest_error, self._systematic.total / den)
        of_out, of_lse = self._of_out(out, lse, den, size, keys), self._of_lse(lse, rise, den, steady, keys)
        anything = 1.01 * (np.linalg.norm(out, axis=1) + self._largest_value)  # out is a mean of values
        of_out = np.minimum(np.where(unknown, np.inf, of_out), anything)
        overflows = (self._largest_sum > 1) | (self._lost > matter) | (size > OVERFLOW)
        of_out, of_lse = (np.where(overflows, np.inf, allowed) for allowed in (of_out, of_lse))
        of_out, of_lse = (np.where(empty, 0.0, allowed) for allowed in (of_out, of_lse))
        return Allowance(np.where(np.isnan(of_out), 0.0, of_out), np.where(np.isnan(of_lse), 0.0, of_lse))  # of rows of NaN

    def _of_out(self, out: Array64, lse: Array64, den: Array64, size: Array64, keys: npt.NDArray[np.int64]) -> Array64:
        length = np.linalg.norm(out, axis=1)
        deviation = UNIT * math.sqrt(VARIANCE)
        partial = np.sqrt(self._partials.square / keys)
        if self._value_dim == 1:  # the product with one column is a dot product, whose lanes add up keys that lie apart
            partial = np.maximum(partial, size)
        varying = [
            np.sqrt(self._random.about(out)) / den,
            deviation * np.sqrt(np.minimum(keys, 128 + keys / 128)) * partial / den,
            2 * deviation * (np.abs(lse) + 2) * np.sqrt(self._partials.about(out) / keys) / den,  # merges of whole spans
        ]
        steady = [
            np.sqrt(self._systematic.total * self._systematic.about(out)) / den,
            2 * UNIT * np.linalg.norm(self._slope_vector - out * self._slope[:, None], axis=1) / den,
            UNIT / 2 * np.sqrt(np.maximum(self._square_of_values / den - length**2, 0.0)),  # of exp, where values go with it
            UNIT / 2 * np.minimum(keys, 256 + keys / 256) * np.maximum(self._drift, self._repeated * self._peak / den) / den,
            2 * UNIT * length,
            keys * (SMALLEST["float32"] * math.sqrt(self._value_dim) + 2.0**-126 * self._largest_value),  # underflow
        ]
        if self._rounded is not None:  # weights one by one, or all alike where they are equal; partial results of libraries
            rounded = [np.sqrt(self._rounded.about(out)) / den, length, partial / den]
            spread = math.sqrt(VARIANCE / 2) * (1 + SIGMAS / math.sqrt(2 * self._value_dim))  # of a norm over Dv elements
            most = np.maximum(FEW_WEIGHTS * spread * np.linalg.norm(rounded, axis=0), self._drift / den)
            steady.append(self._weight_roundoff * most)
        allowed: Array64 = np.sum(steady, axis=0) + SIGMAS * np.linalg.norm(varying, axis=0)
        return allowed

    def _of_lse(self, lse: Array64, rise: Array64, den: Array64, steady: Array64, keys: npt.NDArray[np.int64]) -> Array64:
        of_den = UNIT * np.sqrt(VARIANCE / 3 * np.minimum(keys, 16 + keys / 512))
        varying = np.sqrt(self._random.total / den**2 + of_den**2)
        steady = steady + 2 * UNIT * np.abs(self._slope) / den + (UNIT if self._rounded is None else MATRIX_UNITS)
        steady += self._spread / den  # a standard deviation that all keys share, as where they are nearly equal
        return 1.5 * half_spacing(lse) + half_spacing(rise) + steady + SIGMAS * varying


def half_spacing(numbers: Array64) -> Array64:
    """The largest error of rounding numbers of such a size to float32."""
    _, exponent = np.frexp(np.maximum(np.abs(numbers), 2.0**-100))
    spacing: Array64 = np.ldexp(UNIT, exponent - 1)
    return spacing
