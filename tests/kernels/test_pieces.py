"""The bounds of rows as our own kernel gets them, in 32 bits: what bounds.cu reads of a launch's argument, in Python."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from random_masks import random_edges, random_part

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from oocattn.kernels.cuda import listing
from oocattn.kernels.cuda.far import brought_near
from oocattn.kernels.cuda.pieces import COLUMNS
from oocattn.kernels.cuda.tuning import numbers_for, tuning_for
from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.problem.mask import Mask


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The pieces [pieces, COLUMNS] of each launch, which is not made."""
    found: list[np.ndarray] = []

    def launch(name: str, device: torch.device, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        numbers = np.array(arguments[0])
        assert numbers.dtype == np.int32
        found.append(numbers[2:].reshape(-1, COLUMNS)[: numbers[1]].astype(np.int64))

    monkeypatch.setattr(listing, "_program", lambda tuning: SimpleNamespace(launch=launch))
    return found


def read(pieces: np.ndarray, row: int) -> tuple[list[int], int]:
    """What a row attends, [a, b) and [c, d), and its position: `Piece` of pieces.cuh."""
    _, start, *stop, fixed, offset, least, most, position = pieces[np.searchsorted(pieces[:, 0], row, "right")].tolist()
    for moved in (row + stop[0], row + offset, row + position):
        assert abs(moved) < 1 << 31
    end = min(max(row + stop[0], stop[1]), stop[2])
    first = min(fixed, end)
    resume = min(max(row + offset, least), most)
    return [start, first, max(min(resume, end), first), end], row + position


def far_intervals(seed: int) -> Intervals:
    """Of random rows and keys near each other, in a problem with up to 2^42 rows and keys before them."""
    rng = random.Random(seed)
    documents, before = rng.choice([1, 2, 7]), [rng.choice([0, 2**24 + 1, 2**31 - 5, 2**33, 2**42]) for _ in range(2)]
    totals = [rng.randint(1, 60) for _ in range(2)]
    edges = [
        np.array([0, *(random_edges(rng, documents, total)[1:] + more)]) for total, more in zip(totals, before, strict=True)
    ]
    edges[rng.choice([0, 1])][-1] += rng.choice([0, 2**31, 2**40])  # behind the rows or the keys
    options = {"causal": rng.random() < 0.5, "left": rng.choice([None, 0, 9, 2**33]), "right": rng.choice([None, 5])}
    mask = Mask(*edges, **options, prefix=rng.choice([0, 3]), sinks=rng.choice([0, 3]))
    parts = [random_part(rng, total) for total in totals]
    moved = [range(part.start + more, part.stop + more) for part, more in zip(parts, before, strict=True)]
    return make_intervals(mask, *moved)


def test_bounds_and_positions_of_rows_far_away_fit_32_bits(launched: list[np.ndarray]) -> None:
    tuning = tuning_for(128, 128, numbers_for("float16"), long=False, plain=False)
    for seed in range(150):
        intervals = far_intervals(seed)
        near, distance = brought_near(intervals)
        listing.list_items(1, near, tuning, torch.device("cpu"), positions=True)
        values, positions = zip(*(read(launched[-1], row) for row in range(intervals.rows)), strict=True)
        np.testing.assert_array_equal(values, intervals.values())
        key = np.arange(intervals.keys)
        apart = np.abs(intervals.positions()[:, None] - key)
        assert (np.abs(np.array(positions)[:, None] - key) + distance[:, None] == apart).all()
