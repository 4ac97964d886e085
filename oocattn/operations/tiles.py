"""Tiles of one query chunk of a subproblem: the keys that meet a query piece.

Pure integers. On a CPU a piece is a whole chunk and a tile all keys of a kind; on a GPU both are what fits the device. With
pieces of 2 rows and tiles of 1 key, the second piece of a causal chunk of 4, which owns its diagonal, has these tiles (rows
down, keys across; a column is a tile, `#` a full one):

    own keys   0  1  2  3
    row 2      #  #  2
    row 3      #  #  2  3
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from oocattn.division.base import Block, Subproblem
from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Cover, Mask


@dataclass(frozen=True)
class Tile:
    """Staged keys, and the rows of a query piece that attend any: one kernel call.

    `rows` are counted within the piece, `keys` within what was staged; the tokens are the problem's. Where the rows attend
    different keys, these are one run of tokens.
    """

    mask: Mask
    rows: range
    keys: range
    row_tokens: range
    key_tokens: tuple[range, ...]
    cover: Cover

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head."""
        if self.cover is Cover.FULL:
            return len(self.rows) * len(self.keys)
        return sum(self.mask.pairs(self.row_tokens, run) for run in self.key_tokens)

    def intervals(self) -> Intervals | None:
        """The keys that each row attends, as kernels take them."""
        return None if self.cover is Cover.FULL else make_intervals(self.mask, self.row_tokens, self.key_tokens[0])


@dataclass(frozen=True)
class StagedKeys:
    """A run of staged keys, and the tokens that they are."""

    rows: range
    tokens: tuple[range, ...]

    def pieces(self, size: int) -> Iterator[StagedKeys]:
        """Consecutive parts, each of `size` keys but for the last."""
        for part in pieces(self.rows, size):
            yield StagedKeys(part, tuple(self._tokens_of(part)))

    def _tokens_of(self, part: range) -> Iterator[range]:
        first = self.rows.start  # staged row of the first token of a run
        for run in self.tokens:
            start, stop = max(part.start, first), min(part.stop, first + len(run))
            if start < stop:
                yield run[start - first : stop - first]
            first += len(run)


def make_tiles(
    mask: Mask, tokens: Callable[[int], range], block: Block, key_rows: Mapping[int, range], rows: range, size: int
) -> Iterator[Tile]:
    """The tiles of rows `rows` of a block's query chunk, each of at most `size` keys.

    `tokens` gives those of a chunk, and `key_rows` where the keys of a chunk were staged. First come the chunks that the
    whole query chunk attends, those that lie side by side in one run, and then the others, cut where the mask cuts them.
    """
    queries = tokens(block.query_chunk)
    chunks = sorted((*block.key_chunks, *[block.query_chunk] * block.diagonal))
    # The diagonal of a triangular mask is always by itself: of a chunk of one row it is full, like the chunks below.
    cut = [
        chunk
        for chunk in chunks
        if mask.cover(queries, tokens(chunk)) is not Cover.FULL or (mask.triangular and chunk == block.query_chunk)
    ]
    whole = [StagedKeys(key_rows[chunk], (tokens(chunk),)) for chunk in chunks if chunk not in cut]
    piece = queries[rows.start : rows.stop]
    for run in join_runs(whole):
        for part in run.pieces(size):
            yield Tile(mask, range(len(rows)), part.rows, piece, part.tokens, Cover.FULL)
    for chunk in cut:
        staged = key_rows[chunk].start - tokens(chunk).start
        for keys, _ in mask.split(piece, tokens(chunk)):
            for own in pieces(keys, size):
                live = mask.live_rows(piece, own)
                local = range(live.start - piece.start, live.stop - piece.start)
                there = range(staged + own.start, staged + own.stop)
                yield Tile(mask, local, there, live, (own,), mask.cover(live, own))


def pieces(rows: range, size: int) -> Iterator[range]:
    """Consecutive parts of `rows`, each of `size` but for the last."""
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def join_runs(runs: Iterable[StagedKeys]) -> list[StagedKeys]:
    """Join runs staged side by side: [0-2), [2-5), [7-9) become [0-5), [7-9)."""
    joined: list[StagedKeys] = []
    for run in runs:
        if joined and joined[-1].rows.stop == run.rows.start:
            before = joined.pop()
            joined.append(StagedKeys(range(before.rows.start, run.rows.stop), (*before.tokens, *run.tokens)))
        else:
            joined.append(run)
    return [run for run in joined if run.rows]


def staged_keys(plan: Plan, subproblem: Subproblem) -> dict[int, range]:
    """The staged rows of each key chunk, where all keys are staged in one piece."""
    rows, total = {}, 0
    for chunk in subproblem.key_chunks:
        count = len(plan.tokens(chunk))
        rows[chunk] = range(total, total + count)
        total += count
    return rows
