"""Tiles of one query chunk of a subproblem: the keys that meet a query piece.

Pure integers. On a CPU a piece is a whole chunk and a tile all keys of a kind; on a GPU both are what fits the device. With
pieces of 2 rows and tiles of 1 key, the second piece of a causal chunk of 4, which attends its own keys, has these tiles
(rows down, keys across; a column is a tile, `#` a full one):

    own keys   0  1  2  3
    row 2      #  #  2
    row 3      #  #  2  3
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from oocattn.division.base import Block
from oocattn.kernels.intervals import Intervals, make_intervals
from oocattn.operations.staging import Run, StagedRows
from oocattn.problem.mask import Cover, Mask


@dataclass(frozen=True)
class Tile:
    """Staged keys, and the rows of a query piece from the first to the last that attends any: one kernel call.

    `rows` are counted within the piece, `keys` within what was staged; `row_tokens` and `key_tokens` are the problem's.
    Where the rows attend different keys, these are one run of tokens.
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

    def intervals(self, *, always: bool = False) -> Intervals | None:
        """The keys that each row attends, as kernels take them; None where that is all, unless `always`."""
        if self.cover is Cover.FULL and not always:
            return None
        (keys,) = self.key_tokens
        return make_intervals(self.mask, self.row_tokens, keys)


def make_tiles(
    mask: Mask,
    queries: range,
    key_rows: Callable[[int], range],
    block: Block,
    staged: StagedRows,
    rows: range,
    size: int,
    *,
    join: bool,
) -> Iterator[Tile]:
    """The tiles of rows `rows` of a block, whose query chunk is `queries`, each of at most `size` keys.

    First come the chunks that the whole query chunk attends, then the others, cut where the mask cuts them. Of the first,
    those that are staged side by side are joined into one run, if asked to, although their tokens may lie apart.
    """
    cut: list[Run] = []
    whole: list[Run] = []
    for chunk in block.key_chunks:
        # The diagonal of a triangular mask is always by itself: of a chunk of one row it is full, like the chunks below.
        own = mask.is_triangular and chunk == block.query_chunk
        is_whole = not own and mask.cover(queries, key_rows(chunk)) is Cover.FULL
        (whole if is_whole else cut).extend(staged.keys[chunk])
    for joined in _join(whole, join):
        for part in pieces(range(joined[0].place.start, joined[-1].place.stop), size):
            yield Tile(mask, range(len(rows)), part, rows, tuple(_tokens(joined, part)), Cover.FULL)
    for run in _join_neighbours(cut, mask):
        for keys, _ in mask.split(rows, run.rows):
            for own_keys in pieces(keys, size):
                live = mask.live_rows(rows, [own_keys])
                if not live:
                    continue
                tokens = range(live[0].start, live[-1].stop)
                local = range(tokens.start - rows.start, tokens.stop - rows.start)
                yield Tile(mask, local, run.part(own_keys).place, tokens, (own_keys,), mask.cover(tokens, own_keys))


def pieces(rows: range, size: int) -> Iterator[range]:
    """Consecutive parts of `rows`, each of `size` but for the last."""
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def _join(runs: Iterable[Run], apart: bool) -> list[list[Run]]:
    """Groups of runs that are staged side by side; those whose tokens are not neighbours only where they may lie `apart`."""
    found: list[list[Run]] = []
    for run in runs:
        if not run.rows:
            continue
        last = found[-1][-1] if found else None
        if last and last.place.stop == run.place.start and (apart or last.rows.stop == run.rows.start):
            found[-1].append(run)
        else:
            found.append([run])
    return found


def _join_neighbours(runs: Iterable[Run], mask: Mask) -> Iterator[Run]:
    """Runs of neighbouring tokens as one, but for a triangular mask, whose diagonal chunk stays by itself."""
    for group in _join(runs, False):
        if mask.is_triangular:
            yield from group
        else:
            first, last = group[0], group[-1]
            yield Run(range(first.rows.start, last.rows.stop), range(first.place.start, last.place.stop))


def _tokens(runs: Iterable[Run], part: range) -> Iterator[range]:
    """The tokens of a part of what was staged, run by run; neighbours as one."""
    found: list[range] = []
    for run in runs:
        start, stop = max(part.start, run.place.start), min(part.stop, run.place.stop)
        if start < stop:
            first = run.rows.start + start - run.place.start
            if found and found[-1].stop == first:
                found[-1] = range(found[-1].start, first + stop - start)
            else:
                found.append(range(first, first + stop - start))
    yield from found
