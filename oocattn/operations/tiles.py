"""Tiles of one query chunk of a subproblem: the keys that meet a query piece.

Pure integers. On a CPU a piece is a whole chunk and a tile all keys of a kind; on a GPU both are what fits the device. With
pieces of 2 rows and tiles of 1 key, the second piece of a causal chunk of 4, which attends its own keys, has these tiles
(rows down, keys across; a column is a tile, `#` a full one):

    own keys   0  1  2  3
    row 2      #  #  2
    row 3      #  #  2  3
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from oocattn.division.base import Block
from oocattn.kernels.intervals import Intervals
from oocattn.operations.staging import Run, StagedRows
from oocattn.problem.bounds import Bounds, Int64s, hull, span_of
from oocattn.problem.mask import Cover, Mask


@dataclass(frozen=True)
class Tile:
    """Staged keys, and the rows of a query piece from the first to the last that attends any: one kernel call.

    `rows` are counted within the piece, `keys` within what was staged; `row_tokens` and `key_tokens` are the problem's.
    Where the rows attend different keys, none of them attends a token between two of the runs; only there are `intervals`
    and `ledger` asked for tiles of several runs. What follows from it is
    found once: head groups of one mask share their tiles.
    """

    mask: Mask
    rows: range
    keys: range
    row_tokens: range
    key_tokens: tuple[range, ...]
    cover: Cover

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs of one head."""
        if self.cover is Cover.FULL:
            return len(self.rows) * len(self.keys)
        return self.mask.pairs(self.row_tokens, hull(self.key_tokens))

    def intervals(self, *, always: bool = False) -> Intervals | None:
        """The keys that each row attends, as kernels take them; None where that is all, unless `always`."""
        return None if self.cover is Cover.FULL and not always else self._intervals

    @cached_property
    def ledger(self) -> Bounds:
        """What enters a ledger where rows attend different keys: these, as the problem counts them, of the tile's rows."""
        return self._bounds.moved(self.row_tokens.start, 0)

    @cached_property
    def _intervals(self) -> Intervals:
        return Intervals.of(self._bounds, self.row_tokens, *self.key_tokens)

    @cached_property
    def _bounds(self) -> Bounds:
        return self.mask.bounds(self.row_tokens, hull(self.key_tokens))


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

    First come the chunks that the whole query chunk attends, then the others, cut where the mask cuts them. Keys that are
    staged side by side are one tile, although their tokens may lie apart: of the first, and of the others where the rows are
    of several documents and attend nothing in between. Unless told to `join` them, no document has keys of two runs.
    """
    cut: list[Run] = []
    whole: list[Run] = []
    for chunk in block.key_chunks:
        # The diagonal of a triangular mask is always by itself: of a chunk of one row it is full, like the chunks below.
        own = mask.is_triangular and chunk == block.query_chunk
        is_whole = not own and mask.cover(queries, key_rows(chunk)) is Cover.FULL
        (whole if is_whole else cut).extend(staged.keys[chunk])
    for joined in _join(whole, lambda gap: join or not gap):
        for part in pieces(_places(joined), size):
            yield Tile(mask, range(len(rows)), part, rows, tuple(_tokens(joined, part)), Cover.FULL)
    several = _parts_with(mask.query_edges, rows) > 1

    def may_join(gap: range) -> bool:
        apart = join or _parts_with(mask.key_edges, range(gap.start - 1, gap.stop + 1)) > 1  # keys of several documents
        return several and apart and not mask.pairs(rows, gap)

    live = _live_parts(list(_join_neighbours(cut, mask)), mask, rows, several)
    for joined in _join(live, may_join):
        for part in pieces(_places(joined), size):
            yield from _partial_tile(mask, rows, part, tuple(_tokens(joined, part)))


def _partial_tile(mask: Mask, rows: range, keys: range, key_tokens: tuple[range, ...]) -> Iterator[Tile]:
    """The tile of some staged keys, if any of the rows attends one."""
    span = hull(key_tokens)
    live = mask.live_rows(rows, [span])
    if live:
        tokens = range(live[0].start, live[-1].stop)
        local = range(tokens.start - rows.start, tokens.stop - rows.start)
        is_full = mask.pairs(tokens, span) == len(tokens) * len(keys)
        yield Tile(mask, local, keys, tokens, key_tokens, Cover.FULL if is_full else Cover.PARTIAL)


def pieces(rows: range, size: int) -> Iterator[range]:
    """Consecutive parts of `rows`, each of `size` but for the last."""
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def _join(runs: Iterable[Run], may_join: Callable[[range], bool]) -> list[list[Run]]:
    """Groups of runs that are staged side by side, apart by tokens across which they may be joined."""
    found: list[list[Run]] = []
    for run in runs:
        if not run.rows:
            continue
        last = found[-1][-1] if found else None
        if last and last.place.stop == run.place.start and may_join(range(last.rows.stop, run.rows.start)):
            found[-1].append(run)
        else:
            found.append([run])
    return found


def _join_neighbours(runs: Iterable[Run], mask: Mask) -> Iterator[Run]:
    """Runs of neighbouring tokens as one, but for a triangular mask, whose diagonal chunk stays by itself."""
    for group in _join(runs, lambda gap: not gap and not mask.is_triangular):
        yield Run(range(group[0].rows.start, group[-1].rows.stop), _places(group))


def _live_parts(runs: list[Run], mask: Mask, rows: range, several: bool) -> Iterator[Run]:
    """The parts of ascending runs that `rows` attend: of a single document cut where the mask cuts them."""
    if not several:
        yield from (run.part(keys) for run in runs for keys, _ in mask.split(rows, run.rows))
        return
    live = mask.live_keys(rows, range(runs[0].rows.start, runs[-1].rows.stop)) if runs else []
    at = 0
    for run in runs:
        while at < len(live) and live[at].start < run.rows.stop:
            part = range(max(live[at].start, run.rows.start), min(live[at].stop, run.rows.stop))
            if part:
                yield run.part(part)
            if live[at].stop > run.rows.stop:
                break
            at += 1


def _parts_with(edges: Int64s, part: range) -> int:
    """The number of parts, between two edges each, from the first to the last that have any of `part`."""
    first, last = span_of(edges, part)
    return last - first


def _places(runs: Sequence[Run]) -> range:
    """The rows of the staged tensors that runs have, which are staged side by side."""
    return range(runs[0].place.start, runs[-1].place.stop)


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
