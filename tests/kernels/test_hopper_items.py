"""How calls of our own kernel for Hopper GPUs are cut: programs by shared memory, tiles of rows and spans of keys."""

import math
from itertools import product

import numpy as np
import pytest

from oocattn.kernels.cuda.items import PROCESSORS, choose_span, is_split, split_span, steps_of_items
from oocattn.kernels.cuda.tuning import FOLDED_KEYS, MOST_COLUMNS, numbers_for, tuning_for
from oocattn.kernels.intervals import Band
from oocattn.units import round_up

SHARED_BYTES = 232_448  # of a multiprocessor with compute capability 9.0

PLAIN, PRECISE = numbers_for("float16"), numbers_for("float16", precise=True)
SHORT, FOLDED, WIDE, SMALL = TUNINGS = (
    tuning_for(64, 64, PLAIN, long=False, plain=True),
    tuning_for(64, 64, PLAIN, long=True, plain=True),
    tuning_for(256, 256, PLAIN, long=True, plain=True),
    tuning_for(128, 128, PRECISE, long=True, plain=True),
)
every_tuning = pytest.mark.parametrize("tuning", TUNINGS, ids=("short", "folded", "wide", "small"))


def test_steps_of_every_length_are_tested():
    assert [tuning.keys for tuning in TUNINGS] == [128, 128, 80, 64]
    assert [tuning.rows for tuning in TUNINGS] == [192, 192, 128, 128]
    assert [tuning.folds for tuning in TUNINGS] == [False, True, False, False]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("numbers", [PLAIN, PRECISE, numbers_for("float32"), numbers_for("float16", shifted=True)])
def test_programs_of_all_dimensions_fit_a_multiprocessor(numbers, long, plain):
    dims = range(8, MOST_COLUMNS[numbers.weight_parts] + 1, 8)
    for head_dim, value_dim in product(dims, dims):
        tuning = tuning_for(head_dim, value_dim, numbers, long=long, plain=plain)
        assert tuning.numbers == numbers
        widths = round_up(head_dim, 64), round_up(value_dim, 64)
        held = 2 * numbers.parts * (widths[0] * tuning.rows + tuning.stages * tuning.keys * sum(widths))
        held += 4 * tuning.rows * widths[1] if tuning.folds else 0
        assert held + 2048 <= tuning.shared_bytes <= SHARED_BYTES
        assert tuning.stages >= 2
        assert tuning.keys % 16 == 0  # products add up 16 keys at a time
        assert tuning.fold * tuning.keys == (FOLDED_KEYS if tuning.folds else 0)
        assert long or not tuning.folds
        assert tuning.restart * tuning.keys == (256 if numbers.weight_parts == 2 else 0)


@pytest.mark.parametrize("numbers", [PLAIN, PRECISE])
def test_more_columns_than_registers_hold_have_no_program(numbers):
    most = MOST_COLUMNS[numbers.weight_parts]
    with pytest.raises(ValueError, match=f"D = 64, Dv = {most + 8}: expected {most} at most"):
        tuning_for(64, most + 8, numbers, long=False, plain=True)


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
