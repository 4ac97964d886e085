"""The shapes of a plan's tiles, with a sample of each."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from oocattn.division.base import Subproblem
from oocattn.operations.base import Operation
from oocattn.operations.tiles import Tile, pieces
from oocattn.planning.plan import Plan
from oocattn.problem.mask import Cover

SAMPLED_SUBPROBLEMS = 32
"""Subproblems cut at each end of a head group: others have the same shapes."""


class Shape(NamedTuple):
    """The shape of a tile: rows of the piece, rows that attend any key, keys."""

    piece_rows: int
    rows: int
    keys: int
    cover: Cover


def sample_tiles(plan: Plan, operation: Operation) -> dict[Shape, Tile]:
    """A tile of each shape that a GPU computes, in the order in which they first come."""
    found: dict[Shape, Tile] = {}
    count = plan.division.subproblems
    last = max(SAMPLED_SUBPROBLEMS, count - SAMPLED_SUBPROBLEMS)
    for index in itertools.chain(range(min(count, SAMPLED_SUBPROBLEMS)), range(last, count)):
        subproblem = plan.division.subproblem(index)
        key_rows = staged_keys(plan, subproblem)
        for block in subproblem.blocks:
            for rows in pieces(range(len(plan.tokens(block.query_chunk))), plan.tiles.query):
                for tile in operation.tiles(0, block, key_rows, rows, plan.tiles.key):
                    shape = Shape(len(rows), len(tile.rows), len(tile.keys), tile.cover)
                    found.setdefault(shape, tile)
    return found


def staged_keys(plan: Plan, subproblem: Subproblem) -> dict[int, range]:
    """The staged rows of each key chunk, where all keys are staged in one piece."""
    rows, total = {}, 0
    for chunk in subproblem.key_chunks:
        count = len(plan.tokens(chunk))
        rows[chunk] = range(total, total + count)
        total += count
    return rows
