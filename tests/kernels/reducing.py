"""Calls of the kernel of second passes whose weights are reduced, and the arrays that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Places, Reducing, merge_reduced
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
        tokens = np.arange(call.keys)
        self.sums = [each.begin(len(call.query), range(call.rows), tokens) for each in along_rows]

    def attend(self, *spans: range) -> AttentionState:
        """A state with some of the keys, in a call for each span."""
        state: AttentionState | None = None
        for keys in spans:
            places = Places(range(self.call.rows), keys, np.arange(keys.start, keys.stop))
            reducing = Reducing(self.along_keys, self.sums, places)
            state = state or AttentionState.empty(*self.call.query.shape[:2], reducing.columns)
            part = replace(self.call.part(range(self.call.rows), keys), reducing=reducing)
            get_kernel("weights").attend(part, state)
        assert state is not None
        return state

    def merge(self, into: AttentionState, other: AttentionState) -> AttentionState:
        """Merge two states, in place."""
        merge_reduced(self.along_keys, into, other)
        return into

    def arrays(self, state: AttentionState) -> Arrays:
        """What all reductions have: [g, ...]."""
        along_rows = [each.name for each in self.asked if not each.columns]
        found: Arrays = {name: sums.arrays[0] for name, sums in zip(along_rows, self.sums, strict=True)}
        first, unknown = 0, np.isnan(state.den.numpy())
        for reduction, columns in self.along_keys:
            found.update(reduction.values(state.num[..., first : first + columns].numpy(), unknown))
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
