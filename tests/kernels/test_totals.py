"""What a GPU is given to sum over the rows of a block, and what becomes of it; on CPUs, with sums that a test makes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Places, WeightTile
from oocattn.kernels.reductions.totals import Totals
from oocattn.planning.memory import ALIGNMENT, totals_bytes
from oocattn.problem.second_pass import Reduced, SecondPass

QUERIES, KEYS = 1000, 3000


def asked(row_block: int, key_block: int, first: int = 100) -> tuple[Reduced, ...]:
    pools = row_block, key_block, first, -(-KEYS // key_block)
    rows = Reduced("entropy", (), 1), Reduced("top_keys", (8,), 16)
    return Reduced("received"), *rows, Reduced("pooled", pools)


def random_block(chance: random.Random) -> tuple[range, list[range]]:
    """Rows, and ascending runs of keys; some are empty, and some touch."""
    edges = sorted(chance.choices(range(KEYS + 1), k=2 * chance.randint(1, 6)))
    edges[1:2] = edges[2:3] or edges[1:2]  # the second run begins where the first one ends
    start = chance.randrange(100, 100 + QUERIES)
    return range(start, chance.randint(start + 1, 100 + QUERIES)), [
        range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)
    ]


class Memory:
    """Counts what is taken as an arena does."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.full(shape, 77, dtype=dtype)
        self.taken = -(-self.taken // ALIGNMENT) * ALIGNMENT + tensor.nbytes
        return tensor


@pytest.mark.parametrize("seed", range(40))
def test_keys_and_rows_are_in_the_pools_in_which_a_cpu_has_them(seed: int) -> None:
    chance = random.Random(seed)
    tokens, runs = random_block(chance)
    along_keys, along_rows = reductions_of(asked(chance.choice([1, 7, 300]), chance.choice([1, 10, 999])))
    totals = Totals.begin([each for each, _ in along_keys], along_rows, 2, tokens, runs, Memory().take)
    keys = np.concatenate([np.empty(0, np.int64), *map(np.asarray, runs)])
    assert totals.key_numbers is not None and totals.received is not None and totals.pools is not None  # noqa: PT018
    assert np.array_equal(totals.key_numbers.numpy(), keys)
    weights = torch.from_numpy(np.random.default_rng(seed).random((len(keys), 2 * len(tokens)), np.float32))
    of_heads = weights.view(len(keys), 2, len(tokens)).double().permute(1, 2, 0)
    totals.received[0] += of_heads.sum(1)
    of_rows = (torch.arange(len(tokens)) + totals.pools.before) // totals.pools.rows
    pooled = torch.zeros(2, totals.pools.sums.shape[2], len(keys), dtype=torch.float64).index_add_(1, of_rows, of_heads)
    totals.pools.sums[1].index_add_(2, totals.pools.of_keys, pooled)  # as of numbers that are small
    expected = []
    for each in along_rows:
        begun = each.begin(2, tokens, keys)
        if len(keys):
            sums = begun.begin(Places(tokens, range(len(keys)), keys), range(len(tokens)))
            sums.add(WeightTile(weights, None, 2, range(len(tokens)), range(len(keys))))
            sums.finish()
        expected += begun.arrays
    assert len(totals.arrays) == len(expected) == 2
    for found, right in zip(totals.arrays, expected, strict=True):
        assert found.flags.c_contiguous
        np.testing.assert_allclose(found, right, rtol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_sums_of_a_block_are_added_to_the_places_of_its_rows_and_keys(seed: int) -> None:
    chance = random.Random(seed)
    tokens, runs = random_block(chance)
    keys = np.concatenate([np.empty(0, np.int64), *map(np.asarray, runs)])
    row_block, key_block = chance.choice([1, 7, 300]), chance.choice([1, 10, 999])
    for each in reductions_of(asked(row_block, key_block))[1]:
        begun = each.begin(2, tokens, keys)
        assert each.shapes(2, tokens, runs) == [array.shape for array in begun.arrays]
        shape = each.shape(QUERIES, KEYS)
        (sums,) = (np.random.default_rng(seed).random(array.shape) for array in begun.arrays)
        expected = np.ones((2, *shape))
        of_keys = keys if each.pools is None else np.unique(keys // key_block)
        places = (of_keys,) if each.pools is None else np.ix_(np.unique((np.array(tokens) - 100) // row_block), of_keys)
        expected[:, *places] += sums[..., : len(of_keys)]
        first, found = sorted(chance.sample(range(shape[0] + 1), 2)), np.ones((2, *shape))
        for span in (range(first[0]), range(*first), range(first[1], shape[0])):
            part = found[:, span.start : span.stop]
            before = part.copy()
            if each.meets(span, tokens, runs):
                each.place(part, span, [sums], tokens, runs)
            else:
                assert np.array_equal(before, expected[:, span.start : span.stop]), "a part that no block meets"
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("names", [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2)], ids=str)
def test_they_take_what_is_planned(names: tuple[int, ...]) -> None:
    for seed in range(40):
        chance = random.Random(seed)
        tokens, runs = random_block(chance)
        every = asked(chance.choice([1, 7, 300]), chance.choice([1, 10, 999]))
        reduced = tuple(every[number] for number in names)
        made: Any = reductions_of(reduced)
        memory = Memory()
        Totals.begin([each for each, _ in made[0]], made[1], 8, tokens, runs, memory.take)
        planned = totals_bytes(SecondPass(reduced=reduced), 8, len(tokens), sum(map(len, runs)))
        assert planned > 0
        assert memory.taken <= planned


def test_a_run_or_a_proof_sums_nothing() -> None:
    for second_pass in (None, SecondPass(3)):
        assert totals_bytes(second_pass, 8, 4096, 4096) == 0
