"""The bounds and items that bounds.cu works out on the GPU, against plain Python."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from any_mask import random_intervals, random_mask

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from oocattn.kernels.cuda.items import FEWEST_STEPS, PROCESSORS, most_steps
from oocattn.kernels.cuda.listing import list_items
from oocattn.kernels.cuda.tuning import numbers_for, tuning_for
from oocattn.kernels.intervals import make_intervals
from oocattn.problem.mask import Mask
from oocattn.units import ceil_div

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


TUNINGS = (
    tuning_for(64, 64, numbers_for("float16"), long=False, plain=True),
    tuning_for(128, 128, numbers_for("float16"), long=True, plain=True),
    tuning_for(256, 256, numbers_for("float16"), long=True, plain=True),
    tuning_for(128, 128, numbers_for("float16", precise=True), long=False, plain=True),
)
"""Of 192 rows and 128, of steps of 128, 80 and 64 keys."""


def steps_of_walk(walk, step):
    low, hole, resume, high = walk
    return [*range(low, hole, step), *range(resume, high, step)]


def expected_items(walks, heads, tuning):
    """The items (tile, first, steps, turn) of the walks of all tiles."""
    lengths = [len(steps_of_walk(walk, tuning.keys)) for walk in walks]
    share = ceil_div(sum(lengths) * heads, 2 * PROCESSORS)
    span = min(max(share, FEWEST_STEPS), most_steps(tuning))
    items = []
    for tile, length in enumerate(lengths):
        turns = max(1, ceil_div(length - span // 16, span)) if length else 0
        edges = [*range(0, turns * span, span), length]
        items += [(tile, start, stop - start, turn) for turn, (start, stop) in enumerate(pairwise(edges))]
    return items, span


def check(intervals, heads, tuning):
    listed = list_items(heads, intervals, tuning, GPU, positions=True)
    items, walks, wholes, bounds, positions = (part.cpu().numpy() for part in listed.parts())
    rows, tile = intervals.rows, tuning.rows
    values, key = intervals.values(), np.arange(intervals.keys)
    a, b, c, d = (bound[:, None] for bound in values.T)
    attended = (a <= key) & (key < b) | (c <= key) & (key < d)
    a, b, c, d = (bound[:, None] for bound in bounds[:rows].T)
    assert ((a <= b) & (c <= d)).all()
    assert (attended == ((a <= key) & (key < b) | (c <= key) & (key < d))).all()
    assert (bounds[rows:, ::2] < 0).all()
    assert (bounds[rows:, 1::2] > intervals.keys).all()
    assert (positions[:rows] == intervals.positions()).all()
    for number, walk in enumerate(walks):
        of_tile = attended[number * tile : (number + 1) * tile].any(0)
        a, b, c, d = wholes[number]
        assert attended[number * tile : (number + 1) * tile, (a <= key) & (key < b) | (c <= key) & (key < d)].all()
        low, hole, resume, high = walk
        walked = (low <= key) & (key < hole) | (resume <= key) & (key < high)
        assert walked[of_tile].all()
        if of_tile.any():
            live = np.flatnonzero(of_tile)
            assert (min(low, resume), max(hole, high)) == (live[0], live[-1] + 1)
        else:
            assert not walked.any()
    expected, span = expected_items(walks.tolist(), heads, tuning)
    found = [tuple(item) for item in items.tolist()]
    assert sorted(found) == sorted(expected)
    assert len(found) <= listed.layout.most_items
    full = [turn for _, _, steps, turn in found if steps >= span]
    rest = [steps for _, _, steps, _ in found if steps < span]
    assert full == sorted(full)
    assert rest == sorted(rest, reverse=True)
    assert all(item[2] >= span for item in found[: len(full)])


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_bounds_and_items_of_random_masks(tuning):
    rng = random.Random(tuning.keys * tuning.rows)
    for _ in range(40):
        check(random_intervals(rng, random_mask(rng, 3000)), rng.choice([1, 3, 300]), tuning)


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_items_of_long_spans(tuning):
    """Of so many heads that items have as many steps as they may."""
    mask = Mask.of(300, 150_000, left=149_800, right=100)
    check(make_intervals(mask, range(300), range(150_000)), 3000, tuning)


def test_a_window_with_sinks_walks_its_own_keys_alone():
    mask = Mask.of(40_000, 40_000, causal=True, left=1000, sinks=4)
    intervals = make_intervals(mask, range(20_000, 21_000), range(40_000))
    walks = list_items(1, intervals, TUNINGS[1], GPU, positions=False).parts()[1].tolist()
    for tile, walk in enumerate(walks):
        first, last = 20_000 + 128 * tile, min(20_000 + 128 * (tile + 1), 21_000)
        assert walk == [0, 4, first - 1000, last]
