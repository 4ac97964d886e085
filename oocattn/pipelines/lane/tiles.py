"""How a lane works through one query chunk of a subproblem: which keys pass by a query tile, and which calls they make.

Pure integers. A tile's rows are attended by plain rectangles and, on a causal diagonal, by triangles of at most one key
tile. On a CPU a tile is a whole chunk, or all keys. With tiles of 2 (query) and 1 (key) chunk rows, the second query
tile of a chunk of 4, which owns its diagonal, sees, per key tile (rows down, keys across; `#` rectangle, `\\`
triangle):

    own keys   0  1  2  3
    row 2      #  #  \\
    row 3      #  #  #  \\
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from oocattn.division.base import Block, Subproblem
from oocattn.planning.plan import Plan

SAMPLED_SUBPROBLEMS = 32
"""Subproblems at the beginning and at the end of a head group of which `call_shapes` tells the shapes. Those of others are
the same, but for a few with the last chunk, which may be shorter."""


@dataclass(frozen=True)
class Call:
    """One kernel call: these rows of the query tile attend the key tile; `diagonal` is the triangle."""

    rows: range
    diagonal: bool


@dataclass(frozen=True)
class KeyTile:
    """Staged keys that pass by a query tile, and the calls on them."""

    keys: range
    calls: tuple[Call, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head."""
        count = len(self.keys)
        return sum(count * (count + 1) // 2 if call.diagonal else count * len(call.rows) for call in self.calls)


@dataclass(frozen=True)
class CallShape:
    """Of a kernel call: query rows of the tile, those of them that attend, and keys; for each head."""

    tile_rows: int
    rows: int
    keys: int
    diagonal: bool


def staged_keys(plan: Plan, subproblem: Subproblem) -> dict[int, range]:
    """The rows of each key chunk where all keys of a subproblem are staged in one piece."""
    rows, total = {}, 0
    for chunk in subproblem.key_chunks:
        count = len(plan.tokens(chunk))
        rows[chunk] = range(total, total + count)
        total += count
    return rows


def call_shapes(plan: Plan) -> dict[CallShape, None]:
    """The shapes of the calls that a GPU makes, in the order in which they first come."""
    shapes: dict[CallShape, None] = {}
    count = plan.division.subproblems
    last = max(SAMPLED_SUBPROBLEMS, count - SAMPLED_SUBPROBLEMS)
    for index in itertools.chain(range(min(count, SAMPLED_SUBPROBLEMS)), range(last, count)):
        subproblem = plan.division.subproblem(index)
        key_rows = staged_keys(plan, subproblem)
        for block in subproblem.blocks:
            for rows in pieces(range(len(plan.tokens(block.query_chunk))), plan.tiles.query):
                for tile in key_tiles(block, key_rows, rows, plan.tiles.key, plan.problem.causal):
                    for call in tile.calls:
                        shapes[CallShape(len(rows), len(call.rows), len(tile.keys), call.diagonal)] = None
    return shapes


def key_tiles(block: Block, key_rows: dict[int, range], rows: range, size: int, causal: bool) -> Iterator[KeyTile]:
    """The key tiles that pass by query rows `rows` of a block's chunk, each of at most `size` keys.

    `key_rows` says where the keys of each chunk were staged. First come the chunks that all rows attend, those that lie
    side by side in one run, and then, on a causal diagonal, the chunk's own keys up to the rows.
    """
    every = (Call(range(len(rows)), diagonal=False),)
    chunks = block.key_chunks
    if block.diagonal and not causal:
        chunks = tuple(sorted((*chunks, block.query_chunk)))
    for run in contiguous_runs(key_rows[chunk] for chunk in chunks):
        yield from (KeyTile(keys, every) for keys in pieces(run, size))
    if block.diagonal and causal:
        own = key_rows[block.query_chunk].start
        first = own + rows.start
        yield from (KeyTile(keys, every) for keys in pieces(range(own, first), size))
        yield from _diagonal(range(first, first + len(rows)), size)


def _diagonal(own: range, size: int) -> Iterator[KeyTile]:
    """Rows attend the keys of the same tokens up to their own: a triangle, and all rows below it as a rectangle."""
    for keys in pieces(own, size):
        first, last = keys.start - own.start, keys.stop - own.start
        calls = [Call(range(first, last), diagonal=True)]
        if last < len(own):
            calls.append(Call(range(last, len(own)), diagonal=False))
        yield KeyTile(keys, tuple(calls))


def pieces(rows: range, size: int) -> Iterator[range]:
    """Consecutive parts of `rows`, each of `size` but for the last."""
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def contiguous_runs(ranges: Iterable[range]) -> list[range]:
    """Join ascending ranges where one starts at the end of the one before: [0-2), [2-5), [7-9) -> [0-5), [7-9)."""
    runs: list[range] = []
    for rows in ranges:
        if runs and runs[-1].stop == rows.start:
            runs[-1] = range(runs[-1].start, rows.stop)
        else:
            runs.append(rows)
    return [run for run in runs if run]
