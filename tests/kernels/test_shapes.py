"""Parts and runs of any mask: each pair in one part, each row's parts in their order."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from random_masks import random_intervals
from reference import Bools

from oocattn.kernels.intervals import Intervals
from oocattn.kernels.runs import Limits, make_runs
from oocattn.kernels.shapes import Part, Shape, Sizes, make_parts, narrowest_window

TRIANGLES = {
    Shape.FULL: lambda part: np.ones((part.rows, part.keys), int),
    Shape.LOWER: lambda part: np.tri(part.rows, part.keys, dtype=int),
    Shape.UPPER: lambda part: np.tri(part.keys, part.rows, dtype=int).T,
}
"""The pairs of a part."""


def any_parts(random_: random.Random) -> tuple[Intervals, Bools, list[Part]]:
    """Random intervals, what they are as a matrix, and their parts of small sizes."""
    while True:
        intervals, attended = random_intervals(random_, largest=random_.choice([6, 40]), windows=(0, 1, 2, 4, 9))
        window = narrowest_window(intervals)
        if window is None or window > 1:
            break
    sizes = Sizes(random_.choice([3, 8, 100]), random_.choice([1, 2, 4, 8]), random_.choice([1, 2, 4]), (1, 2, 4, 8))
    return intervals, attended, list(make_parts(intervals.rows, intervals.keys, intervals, sizes))


def add(matrix: NDArray[np.int64], part: Part) -> None:
    matrix[part.row : part.row + part.rows, part.key : part.key + part.keys] += TRIANGLES[part.shape](part)


@pytest.mark.parametrize("seed", range(0, 240, 20))
def test_parts_have_every_attended_pair_once_and_no_other(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(20):
        _, attended, parts = any_parts(random_)
        found = np.zeros(attended.shape, np.int64)
        for part in parts:
            assert part.shape is Shape.FULL or part.rows == part.keys
            add(found, part)
        np.testing.assert_array_equal(found, attended)


@pytest.mark.parametrize("seed", range(0, 240, 20))
def test_runs_are_the_parts_and_each_row_meets_its_own_in_their_order(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(20):
        _, attended, parts = any_parts(random_)
        limits = Limits(random_.choice([8, 16]), random_.choice([100, 1000]), random_.choice([1, 4]))
        found = np.zeros(attended.shape, np.int64)
        met: dict[int, list[tuple[Shape, int, int]]] = {row: [] for row in range(len(attended))}
        for rows, runs in make_runs(parts, limits):
            assert len(rows) <= limits.rows
            for run in runs:
                assert rows.start <= run.rows.start
                assert run.rows.stop <= rows.stop
                assert len(run.keys) <= limits.keys
                for part in map(run.part, range(run.count)):
                    add(found, part)
                    for row in range(part.row, part.row + part.rows):
                        met[row].append((part.shape, part.key, part.keys))
        np.testing.assert_array_equal(found, attended)
        for row, order in met.items():
            expected = [part for part in parts if part.row <= row < part.row + part.rows]
            assert order == [(part.shape, part.key, part.keys) for part in expected]


def test_documents_of_one_length_and_blocks_of_a_window_are_few_runs() -> None:
    sizes, limits = Sizes(8192, 512, 1024, (64, 128, 256, 512, 1024)), Limits(4096, 8192, 64)
    documents = [Part(Shape.LOWER, 512 * index, 512, 512 * index, 512) for index in range(8)]
    ((_, (run,)),) = make_runs(documents, limits)
    assert (run.count, run.row_step, run.key_step) == (8, 512, 512)
    triangle = make_parts(2048, 2048, None, sizes)
    assert [run.count for _, runs in make_runs(triangle, limits) for run in runs] == [1]
