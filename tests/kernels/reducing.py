"""Calls of the kernels of second passes whose weights are reduced, and the arrays that come of them.

A call on a GPU is of the kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import BlockSums, Places, Reducing, merge_reduced
from oocattn.kernels.reductions.totals import Totals
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.problem.second_pass import Reduced

Arrays = dict[str, NDArray[Any]]


def all_reductions(keys: int, *, top: int = 8, row_block: int = 64, key_block: int = 50) -> tuple[Reduced, ...]:
    """Every reduction, of rows and keys counted from 0."""
    pools = row_block, key_block, 0, -(-keys // key_block)
    of_rows = Reduced("entropy", (), 1), Reduced("top_keys", (top,), 2 * top)
    return Reduced("received"), *of_rows, Reduced("pooled", pools)


class Reducer:
    """A block of all rows and keys of a call, which may be attended in several calls; the states are merged as is asked."""

    def __init__(self, call: Operands, shift: torch.Tensor, asked: Sequence[Reduced] | None = None) -> None:
        self.asked = all_reductions(call.keys) if asked is None else asked
        self.call = replace(call, value=call.value[:, :0], shift=shift.float())
        self.along_keys, along_rows = reductions_of(self.asked)
        heads, rows, self.device = len(call.query), range(call.rows), call.query.device
        self.sums: list[BlockSums] = []
        self.totals: Totals | None = None
        if self.device.type == "cpu":
            self.sums = [each.begin(heads, rows, np.arange(call.keys)) for each in along_rows]
        else:

            def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device=self.device)

            kept = [each for each, _ in self.along_keys]
            self.totals = Totals.begin(kept, along_rows, heads, rows, [range(call.keys)], take)

    def attend(self, *spans: range) -> AttentionState:
        """A state with some of the keys, in a call for each span."""
        state: AttentionState | None = None
        for keys in spans:
            places = Places(range(self.call.rows), keys, np.arange(keys.start, keys.stop))
            reducing = Reducing(self.along_keys, self.sums, places, self.totals)
            state = state or AttentionState.empty(*self.call.query.shape[:2], reducing.columns, self.device)
            part = replace(self.call.part(range(self.call.rows), keys), reducing=reducing)
            get_kernel("weights" if self.totals is None else "hopper-survey").attend(part, state)
        assert state is not None
        return state

    def merge(self, into: AttentionState, other: AttentionState) -> AttentionState:
        """Merge two states, in place."""
        merge_reduced(self.along_keys, into, other)
        return into

    def arrays(self, state: AttentionState) -> Arrays:
        """What all reductions have: [g, ...]."""
        along_rows = [each.name for each in self.asked if not each.columns]
        sums = [each.arrays[0] for each in self.sums] if self.totals is None else self.totals.arrays
        found: Arrays = dict(zip(along_rows, sums, strict=True))
        first, unknown, of_rows = 0, np.isnan(state.den.cpu().numpy()), state.num.cpu()
        for reduction, columns in self.along_keys:
            found.update(reduction.values(of_rows[..., first : first + columns].numpy(), unknown))
            first += columns
        return found


def survey(call: Operands, shift: torch.Tensor, asked: Sequence[Reduced] | None = None) -> Arrays:
    """The arrays of one call."""
    reducer = Reducer(call, shift, asked)
    return reducer.arrays(reducer.attend(range(call.keys)))


def by_definition(weights: NDArray[np.float64], *, row_block: int = 64, key_block: int = 50) -> Arrays:
    """What is received, entropies and pools of weights [g, rows, keys] in float64."""
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    by_rows = np.add.reduceat(weights, np.arange(0, weights.shape[1], row_block), axis=1)
    pooled = np.add.reduceat(by_rows, np.arange(0, weights.shape[2], key_block), axis=2)
    return {"received": weights.sum(1), "entropy": -(weights * logarithms).sum(2), "pooled": pooled}


def check_top(found: Arrays, weights: np.ndarray, tolerance: float = 1e-5) -> None:
    """The top keys are distinct keys with the largest weights [g, rows, keys], falling, and these weights are theirs."""
    keys, kept = found["top_keys"], found["top_weights"]
    count = keys.shape[2]
    largest = -np.sort(-weights, axis=2)[..., :count]
    np.testing.assert_allclose(kept[..., : largest.shape[2]], largest, rtol=tolerance, atol=1e-37)
    assert not kept[..., largest.shape[2] :].any()
    assert (np.diff(kept, axis=2) <= 0).all()
    there = keys >= 0
    assert np.array_equal(there, kept > 0)
    assert (keys[~there] == -1).all()
    of_keys = np.take_along_axis(weights, np.where(there, keys, 0), axis=2)
    np.testing.assert_allclose(np.where(there, of_keys, 0), kept, rtol=tolerance, atol=1e-37)
    for row, named in zip(keys.reshape(-1, count), there.reshape(-1, count), strict=True):
        assert len(np.unique(row[named])) == named.sum()


def check(found: Arrays, weights: np.ndarray, tolerance: float = 1e-5, *, least: float = 1e-6, **blocks: int) -> None:
    """All reductions are those of the weights [g, rows, keys]; `blocks` are those of `all_reductions`.

    `tolerance` is relative, and `least` is what sums may be off by beside it.
    """
    check_top(found, weights, tolerance)
    for name, expected in by_definition(weights, **blocks).items():
        np.testing.assert_allclose(found[name], expected, rtol=tolerance, atol=least, err_msg=name)
