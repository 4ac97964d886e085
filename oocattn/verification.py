"""Proof after the fact: sampled rows of a result recomputed in float64, with K and V streamed from the dataset.

Nothing of a run is reused here: no kernel, no merge, no division; the formula of attention alone, in numpy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.problem import Problem
from oocattn.storage.create import numpy_dtype
from oocattn.storage.dataset import Dataset
from oocattn.storage.result import ResultArrays

KEY_ROWS = 8192
"""Keys that are read and attended at a time."""

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}

Array64 = npt.NDArray[np.float64]


SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}
"""The smallest number of each dtype: below it, rounding is absolute."""


@dataclass(frozen=True)
class ExactRow:
    """A row in float64: where it is, out [D], lse, the largest sum of |q k| of a score, and the norm of the sums of
    |weight * value|."""

    batch: int
    head: int
    token: int
    out: Array64
    lse: float
    magnitude: float
    size: float


@dataclass(frozen=True)
class RowCheck:
    """One recomputed row: where it is, the error of `out` (norm over D, relative) and of lse (absolute), and their limits.

    Allowed is what the dtype of `out` rounds away, and what float32 arithmetic may lose in sums as large as those of the
    row: 2e-6 and four roundings of its largest score, relative to the sum of |weight * value|. Where values cancel, that
    sum is larger than `out`.
    """

    batch: int
    head: int
    token: int
    error: float
    lse_error: float
    allowed: float
    allowed_lse: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within what is allowed. NaN never is."""
        return self.error <= self.allowed and self.lse_error <= self.allowed_lse


@dataclass(frozen=True)
class Certificate:
    """The outcome of `verify`: every sampled row, and the relative error over all of them together."""

    result: str
    dataset: str
    seed: int
    dataset_unchanged: bool
    error: float
    rows: tuple[RowCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every sampled row is right."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        worst = max(self.rows, key=lambda row: row.error / row.allowed)
        worst_lse = max(row.lse_error for row in self.rows)
        lines = [f"{'batch':>5} {'head':>5} {'token':>12} {'error':>9} {'lse error':>9} {'allowed':>9}"]
        lines += [
            f"{row.batch:>5} {row.head:>5} {row.token:>12,} {row.error:>9.1e} {row.lse_error:>9.1e} {row.allowed:>9.1e}"
            f"{'' if row.passed else '  WRONG'}"
            for row in self.rows
        ]
        lines.append(
            f"{len(self.rows)} rows against float64: relative error {self.error:.1e} over all, {worst.error:.1e} in the "
            f"worst row (head {worst.head}, token {worst.token:,}), lse within {worst_lse:.1e}"
        )
        if not self.dataset_unchanged:
            lines.append("note: the dataset is not byte for byte the one that the run read")
        wrong = sum(not row.passed for row in self.rows)
        lines.append("passed" if self.passed else f"FAILED: {wrong} of {len(self.rows)} rows are wrong; run it again")
        return "\n".join(lines)


def verify_result(
    problem: Problem,
    dataset: Dataset,
    result: ResultArrays,
    *,
    borders: Sequence[int],
    rows: int,
    seed: int,
) -> tuple[float, tuple[RowCheck, ...]]:
    """Recompute `rows` sampled rows and compare them; return the relative error over all, and every row's check.

    The rows are those of `recompute_rows`.
    """
    checks: list[RowCheck] = []
    squares = np.zeros(2)
    for row in recompute_rows(problem, dataset, borders=borders, rows=rows, seed=seed):
        batch, head, token, out = row.batch, row.head, row.token, row.out
        found = np.asarray(result.out[batch, head, token]).astype(np.float64)
        difference = _difference(found, out)
        squares += difference @ difference, np.nansum(out * out)
        length = max(float(np.sqrt(np.nansum(out * out))), 1e-300)
        error = float(np.linalg.norm(difference)) / length
        of_score = 4 * UNIT_ROUNDOFF["float32"] * row.magnitude
        tiny = SMALLEST[problem.out_dtype] * np.sqrt(problem.head_dim)
        allowed = UNIT_ROUNDOFF[problem.out_dtype] + ((2e-6 + of_score) * row.size + tiny) / length
        lse_found = np.asarray(result.lse[batch, head, token], dtype=np.float64).reshape(1)
        lse_error = float(np.abs(_difference(lse_found, np.asarray([row.lse])))[0])
        checks.append(RowCheck(batch, head, token, error, lse_error, allowed, 1e-5 + of_score))
    return float(np.sqrt(squares[0] / max(squares[1], 1e-300))), tuple(checks)


def recompute_rows(
    problem: Problem, dataset: Dataset, *, borders: Sequence[int], rows: int, seed: int
) -> Iterator[ExactRow]:
    """`rows` rows of the result in float64, by streaming K and V from the dataset.

    Sampled are the first and the last token, both sides of chunk borders, and tokens at random, over heads in turn; which
    follows from `seed`.
    """
    groups = defaultdict(list)
    for batch, head, token in sorted(_sample(problem, borders, rows, np.random.default_rng(seed))):
        groups[batch, head // problem.group_size].append((head, token))
    for (batch, kv_head), members in groups.items():
        yield from _recompute(problem, dataset, batch, kv_head, members)


def _difference(found: Array64, expected: Array64) -> Array64:
    """found - expected, and 0 where both are the same NaN or Inf."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    return np.where(same, 0.0, found - np.where(same, 0.0, expected))


def _sample(
    problem: Problem, borders: Sequence[int], rows: int, random: np.random.Generator
) -> Iterator[tuple[int, int, int]]:
    """Distinct (batch, head, token): ends and borders first, random tokens for the rest."""
    tokens = [0, problem.tokens - 1]
    chosen = random.permutation(np.asarray(borders, dtype=np.int64))[: max(1, rows // 4)]
    tokens += [token for border in sorted(chosen) for token in (int(border) - 1, int(border))]
    tokens += [int(token) for token in random.integers(problem.tokens, size=max(0, rows - len(tokens)))]
    heads = problem.batch * problem.query_heads
    first = int(random.integers(heads))
    places = {((first + i) % heads, token) for i, token in enumerate(tokens[:rows])}
    return ((*divmod(head, problem.query_heads), token) for head, token in places)


def _recompute(
    problem: Problem, dataset: Dataset, batch: int, kv_head: int, members: Sequence[tuple[int, int]]
) -> list[ExactRow]:
    """Each (head, token) in float64."""
    dtype = numpy_dtype(problem.dtype)
    query = np.empty((len(members), problem.head_dim))
    row = np.empty((1, problem.head_dim), dtype)
    for index, (head, token) in enumerate(members):
        dataset.arrays["q"].read_rows(batch, head, token, token + 1, row)
        query[index] = row[0]
    tokens = np.asarray([token for _, token in members])
    num, size, den = np.zeros_like(query), np.zeros_like(query), np.zeros(len(members))
    maximum, magnitude = np.full(len(members), -np.inf), np.zeros(len(members))
    last = max(token for _, token in members) + 1 if problem.causal else problem.tokens
    for start in range(0, last, KEY_ROWS):
        stop = min(start + KEY_ROWS, last)
        key, value = (_read64(dataset, name, batch, kv_head, start, stop, dtype) for name in ("k", "v"))
        scores = problem.scale * (query @ key.T)
        attended = np.full(scores.shape, True)
        sizes = np.nan_to_num(problem.scale * (np.abs(query) @ np.abs(key).T), nan=0.0, posinf=0.0)
        magnitude = np.maximum(magnitude, sizes.max(axis=1))
        if problem.causal:
            attended = tokens[:, None] >= np.arange(start, stop)
            scores[~attended] = -np.inf
        risen = np.maximum(maximum, scores.max(axis=1))
        shift = np.where(np.isneginf(risen), 0.0, risen)
        with np.errstate(invalid="ignore"):  # Inf - Inf: such rows are NaN, and are to be
            kept, weights = np.exp(maximum - shift), np.exp(scores - shift[:, None])
        num = num * kept[:, None] + _weighted(weights, value, attended)
        size = size * kept[:, None] + weights @ np.nan_to_num(np.abs(value), nan=0.0, posinf=0.0)
        den = den * kept + weights.sum(axis=1)
        maximum = risen
    sizes = np.nan_to_num(np.linalg.norm(size / den[:, None], axis=1))
    rows = zip(members, num / den[:, None], maximum + np.log(den), magnitude, sizes, strict=True)
    return [
        ExactRow(batch, head, token, out, float(lse), float(largest), float(of_sum))
        for (head, token), out, lse, largest, of_sum in rows
    ]


def _read64(dataset: Dataset, name: str, batch: int, head: int, start: int, stop: int, dtype: np.dtype[Any]) -> Array64:
    rows = np.empty((stop - start, dataset.arrays[name].spec.shape[-1]), dtype)
    dataset.arrays[name].read_rows(batch, head, start, stop, rows)
    return rows.astype(np.float64)


def _weighted(weights: Array64, value: Array64, attended: npt.NDArray[np.bool_]) -> Array64:
    """weights @ value, where a NaN or Inf in a value that a row does not attend stays out of that row."""
    if np.isfinite(value).all():
        return weights @ value
    return np.stack([weights[row, keys] @ value[keys] for row, keys in enumerate(attended)])
