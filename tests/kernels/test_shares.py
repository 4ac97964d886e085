"""Shares of packed documents: each row with keys in one of them; bits that depend on neither threads nor alignment."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from random_masks import random_intervals

from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.shares import attend_shares, make_shares
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_shares_have_every_row_that_attends_once_with_all_its_keys(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(20):
        intervals, attended = random_intervals(random_, largest=1500, windows=(0, 3, 400))
        most = random_.choice([256, 700])
        shares = make_shares(intervals, most)
        owners = np.zeros(intervals.rows, int)
        for rows, keys, pairs in shares:
            assert 0 < len(rows) <= most + 255  # parts of a long document are whole blocks of the library
            owners[rows.start : rows.stop] += 1
            assert attended[rows.start : rows.stop, keys.start : keys.stop].sum() == pairs
        assert (owners <= 1).all()
        assert (owners == 1)[attended.any(1)].all()
        assert sum(share.pairs for share in shares) == attended.sum()
        assert [share.pairs for share in shares] == sorted((share.pairs for share in shares), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"causal": True}, {"left": 300, "right": 0, "sinks": 2}, {}], ids=str)
def test_bits_of_documents_depend_neither_on_threads_nor_on_alignment(options: dict, dtype: torch.dtype) -> None:
    edges = np.array([0, 5, 900, 960, 2400, 2433, 7000])
    every = range(edges[-1])
    intervals = make_intervals(Mask(edges, edges, **options), every, every)
    given = [torch.randn(shape, dtype=dtype) for shape in ((2, 7000, 32), (7000, 32), (7000, 32))]
    states, before = [], torch.get_num_threads()
    try:
        for threads, offset in ((1, 0), (2, 0), (5, 3)):
            torch.set_num_threads(threads)
            query, *others = (torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape) for t in given)
            states.append(AttentionState.empty(*query.shape))
            get_kernel("cpu").attend(Operands(query, *others, Scores(0.2), intervals), states[-1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for state in states[1:]:
        for name in ("num", "den", "max"):
            assert torch.equal(getattr(state, name), getattr(states[0], name)), name


def test_threads_of_shares_use_one_core_each_and_end() -> None:
    edges = np.arange(0, 2001, 100)
    shares = make_shares(make_intervals(Mask(edges, edges), range(2000), range(2000)), 200)
    met, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        attend_shares(shares, lambda share: met.append((share, torch.get_num_threads())))
    finally:
        torch.set_num_threads(before)
    assert set(met) == {(share, 1) for share in shares}
    assert len(shares) == 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("oocattn-share")]
    with pytest.raises(ZeroDivisionError):
        attend_shares(shares, lambda share: 1 // 0)
