"""Sums over keys that the allowance of a row follows from (`rounding.py`): of a tile, of all keys, and how they are merged.

Weights are exp(score - largest score). Sums over other keys have other largest scores: they are merged by factors exp(their
largest - largest of all), which sums of squares of weights take twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from oocattn.verification.products import dot, weigh

Array64 = npt.NDArray[np.float64]


class Moments:
    """Sums over keys of x_j, of x_j v_j and of x_j |v_j|^2, for some rows."""

    def __init__(self, rows: int, value_dim: int) -> None:
        self.total, self.square = np.zeros(rows), np.zeros(rows)
        self.vector = np.zeros((rows, value_dim))

    def scale(self, factor: Array64) -> None:
        """Multiply all sums of each row by a factor [rows]."""
        self.total *= factor
        self.square *= factor
        self.vector *= factor[:, None]

    def add(self, weights: Array64, value: Array64, squares: Array64) -> None:
        """Take x [rows, n], v [n, Dv] and |v|^2 [n]."""
        self.total += weights.sum(axis=1)
        self.square += dot(weights, squares)
        self.vector += weigh(weights, value)

    def merge(self, other: Moments, kept: Array64, added: Array64) -> None:
        """Multiply the sums by `kept` [rows], and add those over other keys times `added` [rows]."""
        self.scale(kept)
        self.total += other.total * added
        self.square += other.square * added
        self.vector += other.vector * added[:, None]

    def about(self, out: Array64) -> Array64:
        """The sum of x_j |v_j - out|^2."""
        cross = np.einsum("md,md->m", out, self.vector)
        found: Array64 = np.maximum(self.square - 2 * cross + self.total * np.einsum("md,md->m", out, out), 0.0)
        return found


class ErrorSums:
    """What keys add up to, of some rows, and the largest of what they have.

    Sums of weights times errors: `systematic` (of one sign), `random` (their squares), `rounded` (of weights that are
    rounded; None where they are not), `spread` (deviations). Sums of weights: `slope` and `slope_vector` times score and
    value, `square_of_values`, `repeated` (of keys that came before). Where weights are rounded, `by_chance` is the sum of
    their squares times those of values. Of all keys: the largest value, sum of products and error; the farthest that a score
    with a large error may `reach`, and one that may be `lost` by overflow.
    """

    def __init__(self, rows: int, value_dim: int, rounds_weights: bool) -> None:
        self.systematic, self.random = (Moments(rows, value_dim) for _ in range(2))
        self.rounded = Moments(rows, value_dim) if rounds_weights else None
        self.slope, self.slope_vector = np.zeros(rows), np.zeros((rows, value_dim))
        self.square_of_values, self.spread, self.repeated, self.by_chance = (np.zeros(rows) for _ in range(4))
        self.largest_value, self.largest_sum, self.largest_error = (np.zeros(rows) for _ in range(3))
        self.reach, self.lost = np.full(rows, -np.inf), np.full(rows, -np.inf)

    def merge(self, other: ErrorSums, kept: Array64, added: Array64) -> None:
        """Take the sums over other keys: weights of these keep the share `kept` [rows], of the others `added`."""
        for mine, others in zip(self._sums, other._sums, strict=True):
            mine *= kept
            mine += others * added
        self.slope_vector *= kept[:, None]
        self.slope_vector += other.slope_vector * added[:, None]
        self.systematic.merge(other.systematic, kept, added)
        self.random.merge(other.random, kept * kept, added * added)
        if self.rounded is not None and other.rounded is not None:
            self.rounded.merge(other.rounded, kept * kept, added * added)
        self.by_chance *= kept * kept
        self.by_chance += other.by_chance * added * added
        for mine, others in zip(self._largest, other._largest, strict=True):
            np.maximum(mine, others, out=mine)

    @property
    def _sums(self) -> tuple[Array64, ...]:
        return self.slope, self.square_of_values, self.spread, self.repeated

    @property
    def _largest(self) -> tuple[Array64, ...]:
        return self.largest_value, self.largest_sum, self.largest_error, self.reach, self.lost


class PartialSums:
    """Sums over the first keys of some rows, as they were taken now and then: their moments, and the largest of them.

    `peak` is the largest norm of a sum of weight times value, `drift` its largest excess over what sums of as large values
    of random signs have.
    """

    def __init__(self, rows: int, value_dim: int) -> None:
        self.moments = Moments(rows, value_dim)
        self.peak, self.drift = np.zeros(rows), np.zeros(rows)

    def scale(self, kept: Array64) -> None:
        """Weights keep the share `kept` [rows]."""
        self.moments.scale(kept * kept)
        self.peak *= kept
        self.drift *= kept

    def take(self, num: Array64, size: Array64, den: Array64, keys: npt.NDArray[np.int64]) -> None:
        """Take sums of weight times value, of weight times |value|, and of weights. They stand for so many keys."""
        squares = np.einsum("md,md->m", num, num)
        self.moments.total += keys * den * den
        self.moments.vector += (keys * den)[:, None] * num
        self.moments.square += keys * squares
        np.maximum(self.peak, np.sqrt(squares), out=self.peak)
        np.maximum(self.drift, 2 * np.sqrt(squares) - size, out=self.drift)
