"""softmax(scores) v of some rows in float64, tile of keys by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.verification.attended import AttendedKeys, Int64s
from oocattn.verification.products import multiply, weigh
from oocattn.verification.rounding import RoundingErrors

Array64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Some query rows of one head group: `query` [rows, D], the keys at which they are, and the terms of their heads.

    `slopes` and `sinks` are ALiBi slopes and learnable sinks [rows], None where there are none.
    """

    query: Array64
    positions: Int64s
    slopes: Array64 | None
    sinks: Array64 | None


@dataclass(frozen=True)
class Sums:
    """Rows in float64: `out` [rows, Dv], lse, the sum of weight times |value|, and what float32 may lose of out and lse."""

    out: Array64
    lse: Array64
    size: Array64
    allowed: Array64
    allowed_lse: Array64


class Softmax:
    """Sums over the keys of some rows of one head group.

    What is as large as a tile lives in buffers that are used again, and the keys and values that are passed are
    overwritten: `recompute_bytes` counts it all.
    """

    def __init__(self, problem: Problem, rows: Rows, attended: AttendedKeys, key_rows: int, weight_roundoff: float) -> None:
        members = len(rows.query)
        self._problem, self._rows, self._attended = problem, rows, attended
        self._num, self._special = (np.zeros((members, problem.value_dim)) for _ in range(2))
        self._buffers = [np.empty(members * key_rows) for _ in range(2)]
        self._rounding = RoundingErrors(
            rows.query, problem.scale, problem.value_dim, attended.keys, key_rows, weight_roundoff
        )
        self._maximum, self._den = np.full(members, -np.inf), np.zeros(members)
        if rows.sinks is not None:
            self._maximum, self._den = rows.sinks.copy(), np.ones(members)
            self._rounding.see_sinks(rows.sinks)
        self._size, self._passed = np.zeros(members), np.zeros(members)
        self._seen = 0  # of the keys that any row attends
        self._counted = 0  # the key up to which a partial sum has been taken

    def weigh(self, key: Array64, start: int, bias: Array64 | None) -> None:
        """Attend the keys [n, D] from `start` on, with a bias [rows or 1, n]: the scores become weights."""
        scores, weights = self._views(len(key))
        multiply(self._rows.query, key, out=scores)
        scores *= self._problem.scale
        hidden = self._attended.hidden(start, start + len(key))
        self._rounding.see_products(key, scores, hidden)
        self._add_terms(scores, start, bias)
        if hidden is not None:
            np.copyto(scores, -np.inf, where=hidden)
            del hidden
        self._rounding.see_scores(scores)
        risen = np.maximum(self._maximum, scores.max(axis=1))
        shift = np.where(np.isneginf(risen), 0.0, risen)
        kept = np.exp(self._maximum - shift)
        np.subtract(scores, shift[:, None], out=weights)
        np.exp(weights, out=weights)
        self._rounding.see_weights(scores, weights, shift, kept)
        for sums in (self._num, self._special, self._size, self._passed, self._den):
            sums *= kept[:, None] if sums.ndim == 2 else kept
        self._den += weights.sum(axis=1)
        self._maximum = risen

    def _add_terms(self, scores: Array64, start: int, bias: Array64 | None) -> None:
        """Cap the scores [rows, n] and add what is added to them, in place."""
        softcap = self._problem.softcap
        if softcap is not None:
            self._rounding.see_cap(scores, softcap)
            scores /= softcap
            np.tanh(scores, out=scores)
            scores *= softcap
        if self._rows.slopes is not None:
            distances = np.subtract.outer(self._rows.positions, np.arange(start, start + scores.shape[1])).astype(np.float64)
            np.abs(distances, out=distances)
            distances *= -self._rows.slopes[:, None]
            scores += distances
            self._rounding.see_bias(distances, scores)
        if bias is not None:
            scores += bias
            self._rounding.see_bias(bias, scores)

    def add(self, value: Array64, start: int) -> None:
        """Add the values [n, Dv] of the keys that were weighed last."""
        _, weights = self._views(len(value))
        hidden = self._attended.hidden(start, start + len(value))
        special = ~np.isfinite(value)
        if special.any():  # a NaN or Inf in a value that a row does not attend stays out of that row
            of_special = np.flatnonzero(special.any(axis=1))
            values = np.where(special[of_special], value[of_special], 0.0)
            for row in range(len(weights)):
                met = slice(None) if hidden is None else ~hidden[row, of_special]
                self._special[row] += weigh(weights[row : row + 1, of_special][:, met], values[met])[0]
            value[special] = 0.0
        lengths = np.sqrt(np.einsum("nd,nd->n", value, value))
        for keys, ends in self._steps(len(value)):
            self._num += weigh(weights[:, keys], value[keys])
            self._size += np.vecdot(weights[:, keys], lengths[keys])
            self._passed += weights[:, keys].sum(axis=1)
            if ends:
                self._take_partial_sum(start + keys.stop)
        self._rounding.see_values(weights, value, lengths, hidden)
        self._seen += len(value)

    def _steps(self, keys: int) -> Iterator[tuple[slice, bool]]:
        """Cut a tile of keys where partial sums are taken (True), about 16 of them in each doubling of the keys."""
        first, last = self._seen, self._seen + keys
        while first < last:
            step = max(16, 1 << max(0, first.bit_length() - 5))
            border = (first // step + 1) * step
            stop = min(border, last)
            yield slice(first - self._seen, stop - self._seen), stop == border
            first = stop

    def sums(self) -> Sums:
        """What has come of the rows."""
        end = self._problem.keys
        self._take_partial_sum(end)
        keys = self._attended.count(0, end)
        den = np.where(self._den == 0, 1.0, self._den)  # no key, or every score is -inf: out is 0
        out = (self._num + self._special) / den[:, None]
        lse = self._maximum + np.log(self._den)
        allowance = self._rounding.allowance(out, lse, self._maximum, self._den, self._size, keys)
        return Sums(out, lse, np.nan_to_num(self._size / den), allowance.out, allowance.lse)

    def _take_partial_sum(self, stop: int) -> None:
        """The sums over the keys before `stop` stand for those since the last call."""
        keys = self._attended.count(self._counted, stop)
        self._rounding.see_partial_sum(self._num, self._size, self._passed, keys)
        self._counted = stop

    def _views(self, keys: int) -> tuple[Array64, Array64]:
        """Views [rows, keys] of the buffers of scores and of weights."""
        rows = len(self._rows.query)
        scores, weights = (buffer[: rows * keys].reshape(rows, keys) for buffer in self._buffers)
        return scores, weights
