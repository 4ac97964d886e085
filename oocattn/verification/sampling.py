"""Which rows are recomputed: sequence ends, chunk borders, and random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np

from oocattn.problem.problem import Problem

StratumName = Literal["first", "last", "border", "uniform"]

STRATA: tuple[StratumName, ...] = get_args(StratumName)
"""First and last token of a sequence; both sides of a border between chunks; uniform over all (batch, head, token)."""

SHARE = 4
"""At most one row of four is chosen by its place (but the last token and the first if there are two or three rows)."""

CONFIDENCE = 0.95


@dataclass(frozen=True, order=True)
class SampledRow:
    """One row of a result, and the strata it was sampled for."""

    batch: int
    head: int
    token: int
    strata: tuple[StratumName, ...]


def sample_rows(problem: Problem, borders: Sequence[int], rows: int, seed: int) -> list[SampledRow]:
    """Draw at most `rows` distinct rows, in the order of heads and tokens.

    `borders` are the first tokens of all chunks but one. Rows chosen by their place take heads in turn. The others are
    drawn uniformly without replacement, whatever was chosen before: a row may be in several strata.
    """
    random = np.random.default_rng(seed)
    heads = problem.batch * problem.query_heads
    most = min(rows - 1, max(2, rows // SHARE))
    chosen = list(islice(_by_place(problem, borders, most, random), most))
    first = int(random.integers(heads))
    strata: dict[int, list[StratumName]] = {}  # of row head * N + token
    for turn, (stratum, token) in enumerate(chosen):
        strata.setdefault((first + turn) % heads * problem.tokens + token, []).append(stratum)
    for row in random.choice(problem.rows, min(rows - len(chosen), problem.rows), replace=False):
        strata.setdefault(int(row), []).append("uniform")
    found = []
    for row, names in strata.items():
        head, token = divmod(row, problem.tokens)
        found.append(SampledRow(*divmod(head, problem.query_heads), token, tuple(names)))
    return sorted(found)


def _by_place(
    problem: Problem, borders: Sequence[int], most: int, random: np.random.Generator
) -> Iterator[tuple[StratumName, int]]:
    yield from (("last", problem.tokens - 1), ("first", 0))
    pairs = min(max(0, most - 2) // 2, len(borders))
    for index in sorted(random.choice(len(borders), pairs, replace=False)) if pairs else ():
        yield from (("border", borders[index] - 1), ("border", borders[index]))


def share_bound(drawn: int) -> float:
    """The most rows that are wrong, as a share, where of `drawn` rows none was.

    With 95% confidence: if a share p were wrong, n right rows would come with a probability of at most (1 - p)^n: 1 -
    0.05^(1/n) solves that for 5%, a little less than 3/n, the "rule of three" (Hanley and Lippman-Hand, JAMA 249:1743,
    1983).
    """
    return float(-np.expm1(np.log(1 - CONFIDENCE) / drawn))
