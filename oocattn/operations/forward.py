"""The forward pass: out = softmax(scores) @ v and the log-sum-exp of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from oocattn.division.base import Block
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise, merge
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations.ledger import ExpectedLedger, enter_tile
from oocattn.operations.tiles import Tile, make_tiles
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Mask


class Forward:
    """Attention by the plan's kernel: q by query chunk, k and v by key chunk. Implements Operation."""

    query_inputs: tuple[str, ...] = ("q",)
    key_inputs: tuple[str, ...] = ("k", "v")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._mask = plan.problem.mask
        self._scores = plan.problem.scores
        self._kernel = get_kernel(plan.kernel)

    def mask(self, head_group: int) -> Mask:
        """The mask of a head group."""
        return self._mask.entry(self._plan.problem.head_group(head_group).batch)

    def tiles(self, head_group: int, block: Block, key_rows: Mapping[int, range], rows: range, size: int) -> Iterator[Tile]:
        return make_tiles(self.mask(head_group), self._plan.tokens, block, key_rows, rows, size)

    def compute(self, tile: Tile, query: Sequence[Tensor], key: Sequence[Tensor], state: AttentionState) -> None:
        (q,), (k, v) = query, key
        part = state.rows(tile.rows.start, tile.rows.stop)
        operands = Operands(q[:, tile.rows.start : tile.rows.stop], k, v, self._scores, tile.intervals())
        self._kernel.attend(operands, part)
        enter_tile(part, tile)

    def merge(self, into: AttentionState, other: AttentionState) -> None:
        merge(into, other)

    def finalise(self, state: AttentionState, out: Tensor, lse: Tensor) -> None:
        finalise(state, out, lse)

    def expected(self, head_group: int, rows: range) -> ExpectedLedger:
        mask = self.mask(head_group)
        return mask.counts(rows), mask.index_sums(rows)
