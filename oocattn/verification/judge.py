"""By how many deviations of the noise rows of a head differ from a second pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.verification.attended import Int64s, attended_ranges, count_keys, key_positions
from oocattn.verification.differences import Differences
from oocattn.verification.noise import SUSPICIOUS, Array64, KeyTerms, QueryTerms, WeightNoise, relative_noise
from oocattn.verification.rounding import CHANCE, least_length
from oocattn.verification.row_sums import Array32, OutSums, Rows

_NOT_COMPARED = math.nextafter(SUSPICIOUS, math.inf)  # of rows of NaN or Inf: suspected after all that differ

NEIGHBOURS = 64
"""Rows that show how large a row usually is. Blocks of rows have a multiple of them, so that they are the same in each."""

FEW = 16  # rows of which a mean says little

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Piece:
    """Some rows of a head: their places among the queries, the norms of these, and what was stored of them.

    `tokens`, `norms`, `lse` and `passed_lse` are [n], `out` is [n, Dv] and `passed` [n, W], of the second pass as
    `passed_lse`.
    """

    batch: int
    query_head: int
    tokens: Int64s
    norms: Array64
    out: Rows
    lse: Array32
    passed: Array32
    passed_lse: Array32


@dataclass(frozen=True)
class Judge:
    """Judges rows of a problem whose softmax weights have this noise."""

    problem: Problem
    weights: WeightNoise

    def sigmas(self, piece: Piece, keys: KeyTerms, sums: OutSums, found: Differences) -> Array64:
        """By how many standard deviations rows differ from the pass at most, in any number: [n], not NaN.

        How noisy they are is added to what was `found`.
        """
        ranges = attended_ranges(self.problem, piece.batch, piece.tokens)
        attended = count_keys(ranges)
        sink = self._sink(piece.query_head)
        lse, total = piece.lse.astype(np.float64), np.exp(piece.passed_lse, dtype=np.float64)
        rows = QueryTerms(piece.norms, lse, self._alibi(piece, ranges), 0.0 if sink is None else abs(sink))
        relative = relative_noise(self.problem, rows, keys) + self.weights.relative
        differences, squares, of_passed, variance = sums.compare(piece.out, piece.passed)
        usual = _usual_square(of_passed, keys.value_square * total.clip(0.0, 1.0) ** 2 / np.maximum(attended, 1))
        np.maximum(squares, of_passed, out=squares)
        variance += (self.weights.variance + relative**2) * np.maximum(squares, usual)
        differences /= np.sqrt(variance)
        expected = 1.0 if sink is None else -np.expm1(sink - lse)
        sigmas: Array64 = np.maximum(differences, np.abs(total - expected) / relative)
        comparable = np.isfinite(sigmas) & np.isfinite(relative)
        if not comparable.all():
            self._judge_special(piece, np.flatnonzero(~comparable), sigmas)
        if keys.shut is not None:
            attended -= (keys.shut[ranges[..., 1]] - keys.shut[ranges[..., 0]]).sum(axis=1)
        if (empty := attended == 0).any():
            comparable &= ~empty
            rest = np.flatnonzero(empty)
            nothing = (piece.out[rest] == 0).all(axis=1) & (piece.passed[rest] == 0).all(axis=1)
            nothing &= (total[rest] == 0) & (lse[rest] == (-np.inf if sink is None else sink))
            sigmas[rest] = np.where(nothing, 0.0, np.inf)
        least = least_length(self.problem.out_dtype, self.problem.value_dim)
        stated = np.maximum(squares, np.minimum(usual, CHANCE**2 * squares))
        _count_noise(found, relative, variance, stated, comparable, least)
        return sigmas

    def _sink(self, query_head: int) -> float | None:
        sinks = self.problem.given.learnable_sink
        return None if sinks is None else float(sinks[query_head])

    def _alibi(self, piece: Piece, ranges: Int64s) -> Array64:
        """The size of the largest ALiBi bias of rows."""
        slopes, rows = self.problem.given.alibi_slopes, len(piece.tokens)
        if slopes is None:
            return np.zeros(rows)
        slope = abs(float(slopes[piece.query_head] if slopes.ndim == 1 else slopes[piece.batch, piece.query_head]))
        positions = key_positions(self.problem, piece.batch, piece.tokens)
        farthest = np.abs(positions[:, np.newaxis] - ranges.reshape(rows, -1)).max(axis=1)
        found: Array64 = slope * farthest.astype(np.float64)
        return found

    def _judge_special(self, piece: Piece, rows: Int64s, sigmas: Array64) -> None:
        """Judge rows that are not comparable: those of NaN and Inf, which the pass has there too, are the last suspects."""
        some = np.isfinite(piece.out[rows]).all(axis=1) | np.isfinite(piece.passed[rows]).any(axis=1)
        sigmas[rows] = np.where(some, np.inf, _NOT_COMPARED)


def _usual_square(squares: Array64, of_values: Array64) -> Array64:
    """The square of a norm that rows have usually [n]: by chance a row of few columns is small, and as noisy as others.

    It is `of_values` [n], that of a mean of values of random signs which are as large as those of all keys. Where the mean
    of the `squares` of neighbouring rows is smaller, so are their values, or those that weigh most: then it is that mean.
    """
    firsts = np.arange(0, len(squares), NEIGHBOURS)
    rows = np.diff(firsts, append=len(squares))
    means = np.where(rows < FEW, np.inf, np.add.reduceat(squares, firsts) / rows)
    found: Array64 = np.fmin(np.repeat(means, rows), of_values)
    return found


def _count_noise(
    found: Differences, relative: Array64, variance: Array64, squares: Array64, comparable: Bools, least: float
) -> None:
    """Count the noise of rows that could be compared, relative to roots of `squares` or to the `least`, and of lse."""
    if not comparable.all():
        relative, variance, squares = relative[comparable], variance[comparable], squares[comparable]
    nonzero = squares > 0
    if not nonzero.all():
        variance, squares = variance[nonzero], squares[nonzero]
    found.see_noise(np.sqrt(variance / np.maximum(squares, least**2)), relative)
