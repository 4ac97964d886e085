"""Sampled rows of a result in float64, with K and V streamed.

Nothing of a run is reused here: no kernel, no merge, no division; the formula of attention alone, in numpy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.dataset import Dataset
from oocattn.verification.attended import AttendedKeys, attended_ranges
from oocattn.verification.findings import RowCheck
from oocattn.verification.rounding import LARGEST, SMALLEST, UNIT_ROUNDOFF, RoundingErrors, slots_for
from oocattn.verification.sampling import SampledRow, sample_rows

KEY_ROWS = 8192
"""Keys that are read and attended at a time, at most."""

GROUP_ROWS = 256
"""Rows of one head group that are recomputed together, at most; for more of them K and V are read again."""

Array64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExactRow(SampledRow):
    """A sampled row in float64: out [D] and lse.

    `size` is the sum of weight times |value|; `allowed` and `allowed_lse` are what float32 may lose of out (norm) and lse.
    """

    out: Array64
    lse: float
    size: float
    allowed: float
    allowed_lse: float


def compare_row(problem: Problem, exact: ExactRow, out: Array64, lse: float) -> RowCheck:
    """The check of one row, found as `out` [D] and `lse`.

    Errors of `out` are relative to the norm of the exact row; where that is nearly nothing, because values cancel or
    are nearly subnormal in the dtype of `out`, to a thousandth of the values' size or to 200 such roundings.
    """
    tiny = SMALLEST[problem.out_dtype] / 2 * math.sqrt(problem.head_dim)
    norm = _norm(np.where(np.isfinite(exact.out), exact.out, 0.0))
    length = max(norm, exact.size / 1000, 200 * tiny)
    allowed = UNIT_ROUNDOFF[problem.out_dtype] * norm + tiny + exact.allowed
    of_lse = np.asarray([lse]), np.asarray([exact.lse])
    with np.errstate(all="ignore"):
        ulps = error_in_ulps(out, exact.out, problem.out_dtype)
        lse_ulps = error_in_ulps(*of_lse, "float32")
        overflow = (np.abs(exact.out) + allowed > LARGEST[problem.out_dtype]) & (out == np.copysign(np.inf, exact.out))
        error = _norm(np.where(overflow, 0.0, _difference(out, exact.out)))
        lse_error = _norm(_difference(*of_lse))
    place = (exact.batch, exact.head, exact.token, exact.strata)
    return RowCheck(
        *place,
        length=length,
        error=error / length,
        allowed=allowed / length,
        lse_error=lse_error,
        allowed_lse=exact.allowed_lse,
        ulps=float(ulps.max()),
        mean_ulps=float(ulps.mean()),
        lse_ulps=float(lse_ulps[0]),
    )


def error_in_ulps(found: Array64, exact: Array64, dtype: str) -> Array64:
    """|found - exact| in units of the last place of `exact` in `dtype`.

    At most 0.5 where it is rounded right; 0 where both are NaN or the same Inf, after rounding; Inf where only one is.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = exact.astype(numpy_dtype(dtype)).astype(np.float64)
        _, exponent = np.frexp(rounded)  # rounded = m * 2^exponent with 0.5 <= m < 1
        unit = np.where(rounded == 0, 0.0, np.ldexp(2 * UNIT_ROUNDOFF[dtype], exponent - 1))
        ulps = np.abs(found - exact) / np.maximum(unit, SMALLEST[dtype])
    special = ~(np.isfinite(found) & np.isfinite(rounded))
    same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
    return np.where(special, np.where(same, 0.0, np.inf), ulps)


def recompute_bytes(problem: Problem, dataset: Dataset, rows: int, key_rows: int) -> int:
    """Host memory, in bytes, to recompute `rows` rows by tiles of keys."""
    members, head_dim = min(rows, GROUP_ROWS), problem.head_dim
    tile = head_dim * (8 + problem.itemsize + 2 + 3 * 8) + 10 * 8  # float64, as read, masks; hashes; order and positions
    weights = members * (5 * 8 + 2 * 8 + 3)  # scores, weights and what errors they have; temporaries; masks
    state = members * 8 * (16 * head_dim + 40)  # query, sums of what is [D], and what is added to them; the exact rows
    repeats = 4 * slots_for(problem.tokens)
    decoding = max(array.decode_bytes for array in dataset.arrays.values())
    return min(key_rows, problem.tokens) * (tile + weights) + state + repeats + decoding


def recompute_rows(
    problem: Problem,
    dataset: Dataset,
    *,
    borders: Sequence[int],
    rows: int,
    seed: int,
    key_rows: int = KEY_ROWS,
    weight_roundoff: float = UNIT_ROUNDOFF["float32"],
) -> Iterator[ExactRow]:
    """Recompute the rows of `sample_rows` in float64, `key_rows` keys at a time.

    What is allowed counts softmax weights as rounded to `weight_roundoff`.
    """
    groups = defaultdict(list)
    for place in sample_rows(problem, borders, rows, seed):
        groups[place.batch, place.head // problem.group_size].append(place)
    for (batch, kv_head), places in groups.items():
        for first in range(0, len(places), GROUP_ROWS):
            of_group = places[first : first + GROUP_ROWS]
            yield from _recompute(problem, dataset, batch, kv_head, of_group, key_rows, weight_roundoff)


def _difference(found: Array64, expected: Array64) -> Array64:
    """|found - expected|. 0 where both are the same NaN or Inf, Inf where only one is not finite."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    finite = np.isfinite(found) & np.isfinite(expected)
    return np.where(same, 0.0, np.where(finite, np.abs(found - np.where(same, 0.0, expected)), np.inf))


def _norm(numbers: Array64) -> float:
    return float(np.sqrt(np.sum(numbers * numbers)))


def _recompute(
    problem: Problem,
    dataset: Dataset,
    batch: int,
    kv_head: int,
    places: Sequence[SampledRow],
    key_rows: int,
    weight_roundoff: float,
) -> list[ExactRow]:
    """Each of these rows of one head group in float64."""
    raw = np.empty((min(key_rows, problem.tokens), problem.head_dim), numpy_dtype(problem.dtype))
    tile = np.empty(raw.shape)
    query = np.empty((len(places), problem.head_dim))
    for index, place in enumerate(places):
        dataset.arrays["q"].read_rows(batch, place.head, place.token, place.token + 1, raw[:1])
        query[index] = raw[0]

    def read(name: str, start: int, stop: int) -> Array64:
        rows = raw[: stop - start]
        dataset.arrays[name].read_rows(batch, kv_head, start, stop, rows)
        np.copyto(tile[: len(rows)], rows)
        return tile[: len(rows)]

    attended = AttendedKeys(attended_ranges(problem, np.asarray([place.token for place in places])))
    softmax = _Softmax(problem, query, attended, len(raw), weight_roundoff)
    with np.errstate(all="ignore"):  # NaN and Inf flow as they come, and what underflows is nothing
        for start in attended.span[:: len(raw)]:
            stop = min(start + len(raw), attended.span.stop)
            softmax.weigh(read("k", start, stop), start)
            softmax.add(read("v", start, stop), start)
        return softmax.rows(places)


class _Softmax:
    """softmax(scale q k) v of some rows of one head group, in float64, tile of keys by tile.

    What is as large as a tile lives in buffers that are used again, and the keys and values that are passed are
    overwritten: `recompute_bytes` counts it all.
    """

    def __init__(
        self, problem: Problem, query: Array64, attended: AttendedKeys, key_rows: int, weight_roundoff: float
    ) -> None:
        members = len(query)
        self._problem, self._query, self._attended = problem, query, attended
        self._num, self._special, self._den = np.zeros_like(query), np.zeros_like(query), np.zeros(members)
        self._maximum = np.full(members, -np.inf)
        self._buffers = [np.empty(members * key_rows) for _ in range(2)]
        self._rounding = RoundingErrors(query, problem.scale, problem.tokens, key_rows, weight_roundoff)
        self._size, self._passed = np.zeros(members), np.zeros(members)
        self._counted = 0

    def weigh(self, key: Array64, start: int) -> None:
        """Attend the keys [n, D] from token `start` on: the scores become weights."""
        scores, weights = self._views(len(key))
        np.matmul(self._query, key.T, out=scores)
        scores *= self._problem.scale
        hidden = self._attended.hidden(start, start + len(key))
        if hidden is not None:
            np.copyto(scores, -np.inf, where=hidden)
            del hidden
        self._rounding.see_keys(key, scores)
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

    def add(self, value: Array64, start: int) -> None:
        """Add the values [n, D] of the keys that were weighed last."""
        _, weights = self._views(len(value))
        hidden = self._attended.hidden(start, start + len(value))
        special = ~np.isfinite(value)
        if special.any():  # a NaN or Inf in a value that a row does not attend stays out of that row
            of_special = np.flatnonzero(special.any(axis=1))
            values = np.where(special[of_special], value[of_special], 0.0)
            for row in range(len(weights)):
                met = slice(None) if hidden is None else ~hidden[row, of_special]
                self._special[row] += weights[row, of_special][met] @ values[met]
            value[special] = 0.0
        lengths = np.sqrt(np.einsum("nd,nd->n", value, value))
        first = start
        while first < start + len(value):
            step = max(16, 1 << max(0, first.bit_length() - 5))  # about 16 partial sums in each doubling of the tokens
            border = (first // step + 1) * step
            last = min(border, start + len(value))
            keys = slice(first - start, last - start)
            self._num += weights[:, keys] @ value[keys]
            self._size += weights[:, keys] @ lengths[keys]
            self._passed += weights[:, keys].sum(axis=1)
            if last == border:
                self._count_partial_sum(border)
            first = last
        self._rounding.see_values(weights, value, lengths, hidden)

    def rows(self, places: Sequence[SampledRow]) -> list[ExactRow]:
        """What has come of the rows, which are at these places."""
        self._count_partial_sum(self._problem.tokens)
        keys = self._attended.count(0, self._problem.tokens)
        den = np.where(self._den == 0, 1.0, self._den)  # every score is -inf: out is 0, as of no key
        out = (self._num + self._special) / den[:, None]
        lse = self._maximum + np.log(self._den)
        allowance = self._rounding.allowance(out, lse, self._maximum, self._den, self._size, keys)
        size = np.nan_to_num(self._size / den)
        columns = (out, lse, size, allowance.out, allowance.lse)
        return [
            ExactRow(place.batch, place.head, place.token, place.strata, row, *map(float, of_row))
            for place, row, *of_row in zip(places, *columns, strict=True)
        ]

    def _count_partial_sum(self, stop: int) -> None:
        """The sums over the keys before `stop` stand for those since the last call."""
        keys = self._attended.count(self._counted, stop)
        self._rounding.see_partial_sum(self._num, self._size, self._passed, keys)
        self._counted = stop

    def _views(self, keys: int) -> tuple[Array64, Array64]:
        """Views [rows, keys] of the buffers of scores and of weights."""
        scores, weights = (buffer[: len(self._query) * keys].reshape(len(self._query), keys) for buffer in self._buffers)
        return scores, weights
