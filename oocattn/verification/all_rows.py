"""The proof of every row of a result: compared with a second pass over its pairs, and recomputed where they differ.

The pass has W numbers for each row, p_k for out . r_k with random signs r_k, and the sum of the weights exp(s_j - lse),
which must be 1. Source: Freivalds, "Fast probabilistic algorithms", MFCS 1979. A pass that is wrong itself accuses right
rows: the recomputation decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import VECTORS
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.rows import RowReader
from oocattn.verification.blocks import Compared
from oocattn.verification.findings import AllRows, RowCheck
from oocattn.verification.recompute import Tiles, check_row, recompute_places
from oocattn.verification.sampling import SampledRow
from oocattn.verification.scan import find_differences

MOST_RECOMPUTED = 1024
"""Suspected rows that are recomputed: the worst."""

MOST_KEPT = 100
"""Wrong rows that are kept one by one."""


@dataclass(frozen=True)
class AllRowsArrays:
    """What a second pass left: its `out` [B, H, N, W] and lse [B, H, N], where, the `seed` of its sign vectors, and words.

    `computed_by` says which kernel and division computed it; `other` is True if these are other than the result's, `rounds`
    if that kernel rounds weights and projected values to float16.
    """

    arrays: ResultArrays
    location: str
    seed: int
    computed_by: str
    other: bool
    rounds: bool

    def beside(self, problem: Problem, dataset: Dataset, result: Mapping[str, RowReader], rounds_weights: bool) -> Compared:
        """A result beside it. Raises IntegrityError where it is no pass over such a result."""
        return Compared(problem, dataset, result, self.readers(problem), self.seed, rounds_weights, self.rounds)

    def readers(self, problem: Problem) -> dict[str, RowReader]:
        """The readers of both. Raises IntegrityError where they are not the arrays of a pass over such a result."""
        shape = problem.out_shape[:3]
        expected = {"out": (*shape, VECTORS), "lse": shape}
        for name, array in self.arrays.by_name.items():
            if (array.shape, array.dtype.name) != (expected[name], "float32"):
                raise IntegrityError(
                    f"array {name!r} of {self.location} is {array.dtype.name} {list(array.shape)}: expected float32 "
                    f"{list(expected[name])}, of a second pass over such a result"
                )
        return {name: RowReader(name, array, self.location) for name, array in self.arrays.by_name.items()}


@dataclass(frozen=True)
class Sizes:
    """What is held at a time: rows that each of some threads compares, and keys and rows of the recomputation."""

    block_rows: int
    threads: int
    recomputed: Tiles


def check_all_rows(given: Compared, about: AllRowsArrays, sizes: Sizes, weight_roundoff: float) -> AllRows:
    """Compare every row of a result with a second pass, and recompute the worst of those that differ.

    What a recomputed row may lose counts softmax weights as rounded to `weight_roundoff`. Raises IntegrityError where the
    pass cannot be read.
    """
    problem = given.problem
    differences = find_differences(given, sizes.block_rows, sizes.threads, MOST_RECOMPUTED)
    places = [_place_of(problem, row) for row in differences.worst_rows.tolist()]
    wrong: list[RowCheck] = []
    wrong_rows = 0
    for exact in recompute_places(problem, given.dataset, places, sizes.recomputed, weight_roundoff):
        found = check_row(problem, exact, given.result)
        if not found.passed:
            wrong_rows += 1
            wrong = sorted([*wrong, found], key=_badness, reverse=True)[:MOST_KEPT]
    return AllRows(
        rows=problem.rows,
        vectors=VECTORS,
        seed=given.seed,
        suspected=differences.suspected,
        recomputed=len(places),
        wrong_rows=wrong_rows,
        wrong=tuple(sorted(wrong, key=lambda row: (row.batch, row.head, row.token))),
        open=differences.open,
        worst=differences.worst,
        noise=differences.noise.at(0.5),
        most_noise=differences.noise.at(0.99),
        lse_noise=differences.lse_noise.at(0.5),
        computed_by=about.computed_by,
        other=about.other,
    )


def _badness(row: RowCheck) -> float:
    return math.inf if math.isnan(row.of_allowed) else row.of_allowed


def _place_of(problem: Problem, row: int) -> SampledRow:
    """The place of a row, counted over all heads."""
    head, token = divmod(row, problem.out_rows)
    return SampledRow(*divmod(head, problem.out_heads), token, ())
