"""The forward pass: out = softmax(scores) @ v and the log-sum-exp of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

from torch import Tensor

from oocattn.division.base import Block
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise, merge
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState, Take
from oocattn.operations.base import Input, SummedBlock
from oocattn.operations.ledger import LedgerChecker, enter_tile
from oocattn.operations.staging import MOST_KEPT_DOCUMENTS, StagedRows
from oocattn.operations.tiles import Tile, make_tiles
from oocattn.planning.memory import ledger_rows
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Mask
from oocattn.problem.problem import HeadGroup
from oocattn.problem.staged import key_arrays, query_arrays

KEPT_PIECES = 256  # pieces of query rows whose tiles are kept for the next head group of the same mask
MOST_KEPT_TILES = 16  # of such a piece: each takes 1 to 5 kilobytes


class Forward:
    """Attention by the plan's kernel: q by query chunk; k, v and biases by key chunk. Implements Operation."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._problem = problem = plan.problem
        self._kernel = get_kernel(plan.kernel)
        self._ledger = LedgerChecker(ledger_rows(plan.device, plan.chunk_rows))
        self._kept_tiles = lru_cache(KEPT_PIECES)(partial(_cut_all, plan))
        self._projection: Tensor | None = None  # of values
        self.query_inputs, self.key_inputs = (tuple(map(Input.of, arrays(problem))) for arrays in (query_arrays, key_arrays))

    def heads(self, name: str, group: HeadGroup) -> tuple[int, ...]:
        if name == "q":
            return group.query_heads
        if name == "key_bias":
            return (0,) if self._problem.bias_heads == 1 else group.query_heads
        return (group.kv_head,)

    def owns(self, name: str, head_group: int) -> bool:
        shared = name == "key_bias" and self._problem.bias_heads == 1
        return not shared or head_group % self._problem.entry_groups == 0

    def tiles(self, head_group: int, block: Block, staged: StagedRows, rows: range, size: int) -> Iterator[Tile]:
        mask = self._plan.mask(head_group)
        if mask.documents > MOST_KEPT_DOCUMENTS or staged.key_total > MOST_KEPT_TILES * size:
            return _cut(self._plan, mask, block, staged, rows, size)
        return iter(self._kept_tiles(mask, block, staged, rows, size))

    def compute(
        self,
        head_group: int,
        tile: Tile,
        query: Sequence[Tensor],
        key: Sequence[Tensor],
        state: AttentionState,
        attended: Callable[[int], object] | None = None,
        sums: SummedBlock | None = None,
    ) -> None:
        part = state.rows(tile.rows.start, tile.rows.stop)
        self._kernel.attend(self._operands(head_group, tile, query, key, attended, sums), part)
        enter_tile(part, tile)

    def _operands(
        self,
        head_group: int,
        tile: Tile,
        query: Sequence[Tensor],
        key: Sequence[Tensor],
        attended: Callable[[int], object] | None,
        sums: SummedBlock | None,
    ) -> Operands:
        """What the kernel is given of a tile."""
        (q, *shift), (k, v, *bias) = (tensor[:, tile.rows.start : tile.rows.stop] for tensor in query), key
        slopes = self._problem.slopes(self._problem.head_group(head_group))
        return Operands(
            q,
            k[0],
            v[0],
            self._problem.scores,
            tile.intervals(always=slopes is not None),
            slopes,
            bias[0] if bias else None,
            attended,
            shift[0] if shift else None,
            self._projection,
        )

    def begin_sums(self, head_group: int, block: Block, staged: StagedRows, take: Take | None = None) -> SummedBlock | None:
        return None

    def merge(self, into: AttentionState, other: AttentionState) -> None:
        merge(into, other)

    def finalise(self, head_group: int, head: int, state: AttentionState, out: Tensor, lse: Tensor) -> None:
        sinks = self._problem.sinks(self._problem.head_group(head_group))
        finalise(state, out, lse, None if sinks is None else sinks[head : head + 1])

    def wrong_row(self, head_group: int, state: AttentionState, rows: range) -> int | None:
        return self._ledger.find_wrong_row(state, rows, self._plan.mask(head_group))

    def expected(self, head_group: int, row: int) -> tuple[int, int]:
        keys, key_sum = self._plan.mask(head_group).ledger(range(row, row + 1))
        return int(keys[0]), int(key_sum[0])


def _cut(plan: Plan, mask: Mask, block: Block, staged: StagedRows, rows: range, size: int) -> Iterator[Tile]:
    """The tiles of some rows of a block."""
    join = plan.problem.given.alibi_slopes is None  # with slopes, the distance of keys must be that of their places
    queries = plan.query_rows(block.query_chunk)
    return make_tiles(mask, queries, lambda chunk: plan.grid.keys(chunk, mask.keys), block, staged, rows, size, join=join)


def _cut_all(plan: Plan, mask: Mask, block: Block, staged: StagedRows, rows: range, size: int) -> tuple[Tile, ...]:
    return tuple(_cut(plan, mask, block, staged, rows, size))
