"""How calls of our own kernel for Hopper GPUs are cut: programs by shared memory, tiles of rows and spans of keys."""

import math
from itertools import product

import numpy as np
import pytest

from oocattn.kernels.cuda.items import PROCESSORS, choose_span, is_split, split_span, steps_of_items
from oocattn.kernels.cuda.tuning import FOLDED_KEYS, MOST_COLUMNS, tuning_for
from oocattn.kernels.intervals import Band
from oocattn.units import round_up

SHARED_BYTES = 232_448  # of a multiprocessor with compute capability 9.0

PRECISE = {"plain": True, "weight_parts": 2}
SHORT, FOLDED, WIDE, SMALL = TUNINGS = (
    tuning_for(64, 64, long=False, plain=True),
    tuning_for(64, 64, long=True, plain=True),
    tuning_for(256, 256, long=True, plain=True),
    tuning_for(128, 128, long=True, **PRECISE),
)
every_tuning = pytest.mark.parametrize("tuning", TUNINGS, ids=("short", "folded", "wide", "small"))


def test_steps_of_every_length_are_tested():
    assert [tuning.keys for tuning in TUNINGS] == [128, 128, 80, 64]
    assert [tuning.rows for tuning in TUNINGS] == [192, 192, 128, 128]
    assert [tuning.folds for tuning in TUNINGS] == [False, True, False, False]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("parts", "weight_parts"), [(1, 1), (1, 2), (2, 2)])
def test_programs_of_all_dimensions_fit_a_multiprocessor(parts, weight_parts, long, plain):
    dims = range(8, MOST_COLUMNS[weight_parts] + 1, 8)
    for head_dim, value_dim in product(dims, dims):
        tuning = tuning_for(head_dim, value_dim, long=long, plain=plain, parts=parts, weight_parts=weight_parts)
        assert (tuning.parts, tuning.weight_parts) == (parts, weight_parts)
        widths = round_up(head_dim, 64), round_up(value_dim, 64)
        held = 2 * parts * (widths[0] * tuning.rows + tuning.stages * tuning.keys * sum(widths))
        held += 4 * tuning.rows * widths[1] if tuning.folds else 0
        assert held + 2048 <= tuning.shared_bytes <= SHARED_BYTES
        assert tuning.stages >= 2
        assert tuning.keys % 16 == 0  # products add up 16 keys at a time
        assert tuning.fold * tuning.keys == (FOLDED_KEYS if tuning.folds else 0)
        assert long or not tuning.folds
        assert tuning.restart * tuning.keys == (256 if weight_parts == 2 else 0)


@pytest.mark.parametrize("parts", [1, 2])
def test_more_columns_than_registers_hold_have_no_program(parts):
    most = MOST_COLUMNS[parts]
    with pytest.raises(ValueError, match=f"D = 64, Dv = {most + 8}: expected {most} at most"):
        tuning_for(64, most + 8, long=False, plain=True, parts=parts, weight_parts=parts)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize(
    ("rows", "keys", "lower", "upper"),
    [
        (1, 1, -1, 1),
        (300, 65_537, -300, 65_537),
        (1000, 1000, -1000, 1),
        (777, 333, -777, -99),
        (100, 5000, -100, 301),
        (500, 400, -500, -499),
        (5000, 5000, -300, 1),  # windows: the first spans of most tiles are not the first ones
        (5000, 4000, 500, 3900),
        (300, 40_000, 20_000, 40_000),
        (900, 1000, 950, 2000),
    ],
)
@every_tuning
def test_items_cover_every_pair_of_tile_and_step_once_and_in_order(tuning, group_size, rows, keys, lower, upper):
    tile, step, band = tuning.rows, tuning.keys, Band(lower, upper)
    span = choose_span(group_size, rows, keys, band, tuning)
    assert span % step == 0
    assert 0 < span <= (65_536 if tuning.folds else 16_384)
    row, key = np.arange(rows)[:, None], np.arange(keys)
    attended = (row + lower <= key) & (key < row + upper)
    expected = []
    for first in range(0, keys, span):
        for tile_rows in reversed([attended[row : row + tile] for row in range(0, rows, tile)]):
            blocks = [
                tile_rows[:, key : min(key + step, first + span)].any()
                for key in range(first, min(first + span, keys), step)
            ]
            expected += group_size * [sum(blocks)] if any(blocks) else []
    assert steps_of_items(group_size, rows, keys, band, tuning, span) == expected


@pytest.mark.parametrize(("rows", "least"), [(65_536, 0.96), (16_384, 0.94)])
@every_tuning
def test_spans_fill_the_multiprocessors(tuning, rows, least):
    band = Band(-rows, 65_536)
    span = choose_span(1, rows, 65_536, band, tuning)
    items = steps_of_items(1, rows, 65_536, band, tuning, span)
    assert sum(items) / (PROCESSORS * math.ceil(len(items) / PROCESSORS) * max(items)) >= least


@pytest.mark.parametrize(("rows", "keys"), [(512, 65_536), (3, 4096), (1000, 131_072)])
@every_tuning
def test_spans_of_few_rows_fill_the_multiprocessors_once(tuning, rows, keys):
    span, tiles = split_span(rows, keys, tuning), math.ceil(rows / tuning.rows)
    assert span % tuning.keys == 0
    assert span <= 16_384
    assert tiles * math.ceil(keys / span) <= PROCESSORS
    assert span == tuning.keys or tiles * math.ceil(keys / (span - tuning.keys)) > PROCESSORS - tiles


@every_tuning
def test_calls_of_few_rows_of_all_heads_are_split(tuning):
    assert is_split(8, tuning.rows, 4096, tuning)
    assert not is_split(8, tuning.rows, 4095, tuning)
    assert not is_split(9, tuning.rows, 4096, tuning)
    assert not is_split(1, 257, 4096, tuning)


@every_tuning
def test_spans_of_large_calls_are_nearly_the_longest(tuning):
    most, size = 65_536 if tuning.folds else 16_384, 1 << 20
    assert 0.97 * most <= choose_span(8, size, size, Band(-size, size), tuning) <= most
