"""Proof after the fact: sampled rows of a result recomputed in float64, with K and V streamed from the dataset.

Nothing of a run is reused here: no kernel, no merge, no division; the formula of attention alone, in numpy. What is made of
the comparison is `certificate`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocattn.certificate import RowCheck
from oocattn.problem import Problem
from oocattn.sampling import Place, StratumName, sample_rows
from oocattn.storage.create import numpy_dtype
from oocattn.storage.dataset import Dataset

KEY_ROWS = 8192
"""Keys that are read and attended at a time, at most."""

GROUP_ROWS = 256
"""Rows of one head group that are recomputed together, at most; for more of them K and V are read again."""

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}

Array64 = npt.NDArray[np.float64]


SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
"""The smallest number of each dtype: below it, rounding is absolute."""


@dataclass(frozen=True)
class ExactRow:
    """A row in float64: where it is and what it was sampled for, out [D], lse, the largest sum of |q k| of a score, and the
    norm of the sums of |weight * value|."""

    batch: int
    head: int
    token: int
    strata: tuple[StratumName, ...]
    out: Array64
    lse: float
    magnitude: float
    size: float


def compare_row(problem: Problem, exact: ExactRow, out: Array64, lse: float) -> RowCheck:
    """The check of one row, found as `out` [D] and `lse`.

    Allowed is what the dtype of `out` rounds away, and what float32 arithmetic may lose in sums as large as those of the
    row: 2e-6 and four roundings of its largest score, relative to the sum of |weight * value|. Where values cancel, that
    sum is larger than `out`.
    """
    length = max(float(np.sqrt(np.nansum(exact.out * exact.out))), 1e-300)
    of_score = 4 * UNIT_ROUNDOFF["float32"] * exact.magnitude
    tiny = SMALLEST[problem.out_dtype] * np.sqrt(problem.head_dim)
    of_lse = np.asarray([lse]), np.asarray([exact.lse])
    ulps = error_in_ulps(out, exact.out, problem.out_dtype)
    return RowCheck(
        exact.batch,
        exact.head,
        exact.token,
        exact.strata,
        length=length,
        error=float(np.linalg.norm(_difference(out, exact.out))) / length,
        allowed=float(UNIT_ROUNDOFF[problem.out_dtype] + ((2e-6 + of_score) * exact.size + tiny) / length),
        lse_error=float(np.abs(_difference(*of_lse))[0]),
        allowed_lse=1e-5 + of_score,
        ulps=float(ulps.max()),
        mean_ulps=float(ulps.mean()),
        lse_ulps=float(error_in_ulps(*of_lse, "float32")[0]),
    )


def error_in_ulps(found: Array64, exact: Array64, dtype: str) -> Array64:
    """|found - exact| in units of the last place of `exact` as it is in `dtype`: at most 0.5 where it is rounded right.

    0 where both are NaN or the same Inf, after rounding; Inf where only one is.
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
    """Host memory, in bytes, that recomputing so many rows takes with tiles of `key_rows` keys."""
    members, head_dim = min(rows, GROUP_ROWS), problem.head_dim
    tile = head_dim * (8 + problem.itemsize + 2) + 8  # float64, as read, masks of NaN and Inf; positions
    weights = members * (8 + 8 + 2)  # scores, sums of |q k|, masks
    state = members * 8 * (8 * head_dim + 8)  # query, its size, num, size and what is added to them; the exact rows
    decoding = max(array.decode_bytes for array in dataset.arrays.values())
    return min(key_rows, problem.tokens) * (tile + weights) + state + decoding


def recompute_rows(
    problem: Problem, dataset: Dataset, *, borders: Sequence[int], rows: int, seed: int, key_rows: int = KEY_ROWS
) -> Iterator[ExactRow]:
    """Sampled rows of the result in float64, those of `sample_rows`, by streaming K and V, `key_rows` at a time."""
    groups = defaultdict(list)
    for place in sample_rows(problem, borders, rows, seed):
        groups[place.batch, place.head // problem.group_size].append(place)
    for (batch, kv_head), places in groups.items():
        for first in range(0, len(places), GROUP_ROWS):
            yield from _recompute(problem, dataset, batch, kv_head, places[first : first + GROUP_ROWS], key_rows)


def _difference(found: Array64, expected: Array64) -> Array64:
    """found - expected, and 0 where both are the same NaN or Inf."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    return np.where(same, 0.0, found - np.where(same, 0.0, expected))


def _recompute(
    problem: Problem, dataset: Dataset, batch: int, kv_head: int, places: Sequence[Place], key_rows: int
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

    softmax = _Softmax(problem, query, np.asarray([place.token for place in places]), len(raw))
    last = max(place.token for place in places) + 1 if problem.causal else problem.tokens
    for start in range(0, last, len(raw)):
        stop = min(start + len(raw), last)
        softmax.weigh(read("k", start, stop), start)
        softmax.add(read("v", start, stop), start)
    return softmax.rows(places)


class _Softmax:
    """Some rows of one head group, softmax(scale q k) v over the keys that have come, in float64.

    What is as large as a tile of keys lives in buffers that are used again, and the keys and values that are passed are
    overwritten: `recompute_bytes` counts it all.
    """

    def __init__(self, problem: Problem, query: Array64, tokens: npt.NDArray[np.int64], key_rows: int) -> None:
        members = len(query)
        self._problem, self._query, self._tokens = problem, query, tokens
        self._num, self._size, self._den = np.zeros_like(query), np.zeros_like(query), np.zeros(members)
        self._maximum, self._magnitude = np.full(members, -np.inf), np.zeros(members)
        self._kept = np.ones(members)
        self._scores, self._sizes = (np.empty(members * key_rows) for _ in range(2))

    def weigh(self, key: Array64, start: int) -> None:
        """Attend the keys [n, D] from token `start` on: the scores become weights."""
        scores, sizes = (self._view(buffer, len(key)) for buffer in (self._scores, self._sizes))
        with np.errstate(invalid="ignore"):  # Inf - Inf: such rows are NaN, and are to be
            np.matmul(self._query, key.T, out=scores)
            np.matmul(np.abs(self._query), np.abs(key, out=key).T, out=sizes)
            if not np.isfinite(sizes.sum()):
                sizes[~np.isfinite(sizes)] = 0.0
            if self._problem.causal:
                later = self._tokens[:, None] < np.arange(start, start + len(key))
                np.copyto(scores, -np.inf, where=later)
                np.copyto(sizes, 0.0, where=later)
            scores *= self._problem.scale
            risen = np.maximum(self._maximum, scores.max(axis=1))
            shift = np.where(np.isneginf(risen), 0.0, risen)
            self._kept = np.exp(self._maximum - shift)
            scores -= shift[:, None]
            np.exp(scores, out=scores)
        self._den = self._den * self._kept + scores.sum(axis=1)
        self._maximum = risen
        self._magnitude = np.maximum(self._magnitude, self._problem.scale * sizes.max(axis=1))

    def add(self, value: Array64, start: int) -> None:
        """Add the values [n, D] of the keys that were weighed last."""
        weights = self._view(self._scores, len(value))
        self._num *= self._kept[:, None]
        if np.isfinite(value.sum()):
            self._num += weights @ value
            np.abs(value, out=value)
        else:  # a NaN or Inf in a value that a row does not attend stays out of that row
            attended = self._tokens + 1 - start if self._problem.causal else np.full(len(weights), len(value))
            with np.errstate(invalid="ignore"):
                for row, keys in enumerate(attended.clip(0, len(value))):
                    self._num[row] += weights[row, :keys] @ value[:keys]
            np.abs(value, out=value)
            value[~np.isfinite(value)] = 0.0
        self._size *= self._kept[:, None]
        self._size += weights @ value

    def rows(self, places: Sequence[Place]) -> list[ExactRow]:
        """What has come of the rows, which are at these places."""
        sizes = np.nan_to_num(np.linalg.norm(self._size / self._den[:, None], axis=1))
        out, lse = self._num / self._den[:, None], self._maximum + np.log(self._den)
        return [
            ExactRow(place.batch, place.head, place.token, place.strata, row, float(sum_), float(largest), float(size))
            for place, row, sum_, largest, size in zip(places, out, lse, self._magnitude, sizes, strict=True)
        ]

    def _view(self, buffer: Array64, keys: int) -> Array64:
        """As much of a buffer as so many keys need, [rows, keys]."""
        return buffer[: len(self._query) * keys].reshape(len(self._query), keys)
