"""A survey: the pairs of a result once more, their weights reduced along keys and along rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from oocattn.division.base import Block
from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Int64s, Places, Reducing, merge_reduced
from oocattn.kernels.reductions.totals import Totals
from oocattn.kernels.state import AttentionState, Take
from oocattn.operations.base import SummedBlock
from oocattn.operations.second_pass import SecondPass
from oocattn.operations.staging import StagedRows
from oocattn.operations.tiles import Tile
from oocattn.planning.plan import Plan


class Survey(SecondPass):
    """Reductions of the weights of a result, exp(score - log-sum-exp). Values are not read. Implements Operation."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        asked = plan.problem.second_pass
        self._along_keys, self._along_rows = reductions_of((asked and asked.reduced) or ())

    def _operands(
        self,
        head_group: int,
        tile: Tile,
        query: Sequence[Tensor],
        key: Sequence[Tensor],
        attended: Callable[[int], object] | None,
        sums: SummedBlock | None,
    ) -> Operands:
        assert sums is not None
        k, *bias = key
        operands = super()._operands(head_group, tile, query, (k, k[:, :, :0], *bias), attended, sums)
        places = Places(tile.row_tokens, tile.keys, sums.key_tokens[tile.keys.start : tile.keys.stop])
        return replace(operands, reducing=Reducing(self._along_keys, sums.sums, places, sums.totals))

    def begin_sums(self, head_group: int, block: Block, staged: StagedRows, take: Take | None = None) -> SummedBlock:
        """See `Operation.begin_sums`."""
        heads, tokens = len(self._problem.head_group(head_group).query_heads), self._plan.query_rows(block.query_chunk)
        if take is not None:
            kept = [each for each, _ in self._along_keys]
            return SummedBlock(totals=Totals.begin(kept, self._along_rows, heads, tokens, key_runs(staged), take))
        keys = key_tokens(staged)
        return SummedBlock([each.begin(heads, tokens, keys) for each in self._along_rows], keys)

    def merge(self, into: AttentionState, other: AttentionState) -> None:
        merge_reduced(self._along_keys, into, other)


def key_tokens(staged: StagedRows) -> Int64s:
    """The token of each staged key."""
    runs = [np.arange(run.start, run.stop) for run in key_runs(staged)]
    return np.concatenate([np.empty(0, np.int64), *runs])


def key_runs(staged: StagedRows) -> list[range]:
    """The tokens of the staged keys, run by run."""
    return [run.rows for of_chunk in staged.keys.values() for run in of_chunk]
