"""Blocks of rows: all rows once, in their order, with every key that a row attends; short documents share one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from random_masks import random_intervals

from oocattn.kernels.blocks import Block, make_blocks
from oocattn.kernels.intervals import make_intervals
from oocattn.problem.mask import Mask


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_blocks_have_all_rows_and_all_keys_that_they_attend(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(20):
        intervals, attended = random_intervals(random_, largest=1500, windows=(0, 3, 400))
        most, tile = random_.choice([1, 64, 256]), range(*sorted(random_.choices(range(intervals.keys + 1), k=2)))
        blocks = make_blocks(intervals.rows, intervals, most, random_.choice([0, 10_000]))
        assert [row for rows in blocks for row in rows] == list(range(intervals.rows))
        assert all(0 < len(rows) <= most for rows in blocks)
        for rows in random_.sample(blocks, min(5, len(blocks))):
            block = Block.of(rows, intervals.keys, intervals.values()[rows.start : rows.stop])
            live, of_rows = np.zeros(intervals.keys, bool), attended[rows.start : rows.stop]
            for part in block.live_within(tile):
                live[part.start : part.stop] = True
                partial = {key for end in block.partial(part) for key in end}
                assert of_rows[:, [key for key in part if key not in partial]].all()
            assert not of_rows[:, tile.start : tile.stop][:, ~live[tile.start : tile.stop]].any()


def test_short_documents_share_a_block_and_those_of_many_keys_do_not() -> None:
    def of(rows: list[int], keys: list[int]) -> list[range]:
        mask = Mask(np.array(rows), np.array(keys))
        return make_blocks(rows[-1], make_intervals(mask, range(rows[-1]), range(keys[-1])), 256, 5000)

    edges = [0, 10, 30, 50, 800]
    assert of(edges, edges) == [range(50), range(50, 306), range(306, 562), range(562, 800)]
    assert of([0, 1, 2, 3], [0, 10_000, 20_000, 30_000]) == [range(1), range(1, 2), range(2, 3)]
    assert make_blocks(600, None, 256, 0) == [range(256), range(256, 512), range(512, 600)]
