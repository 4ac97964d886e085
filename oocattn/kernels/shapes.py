"""What the rows of a call attend, cut into rectangles and triangles, which a library's attention takes; pure integers.

A causal window of 4 keys, rows in blocks of 2, is cut so (`U` upper triangles, `#` rectangles, `L` lower triangles):

    row  0    L          row 0 and 1 have all keys from the first on: a lower triangle
    row  1    L L
    row  2    # # L      rows 2 and 3: a rectangle, and a lower triangle
    row  3    # # L L
    row  4      U # # L      from row 4 on both ends move: blocks with a triangle at each end
    row  5        U # L L
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from oocattn.kernels.intervals import Intervals
from oocattn.kernels.tiles import make_tiles
from oocattn.problem.document import Ramp
from oocattn.units import round_up


class Shape(Enum):
    """The keys of a part that its rows attend: all, those up to a row's own number, or those from it on."""

    FULL = "full"
    LOWER = "lower triangle"
    UPPER = "upper triangle"


_MIRRORED = {Shape.FULL: Shape.FULL, Shape.LOWER: Shape.UPPER}


class Part(NamedTuple):
    """`rows` rows from `row` on against `keys` keys from `key` on; triangles have as many keys as rows."""

    shape: Shape
    row: int
    rows: int
    key: int
    keys: int


class Sizes(NamedTuple):
    """The most keys of a part, rows of a lower and of an upper triangle, and rows of a block where a window moves."""

    keys: int
    triangle: int
    upper_triangle: int
    blocks: tuple[int, ...]


def narrowest_window(intervals: Intervals) -> int | None:
    """The fewest keys between two ends that both move; None if no row has such."""
    stop, resume = intervals.bounds.stop, intervals.bounds.resume
    moving = (stop.least < stop.most) & (resume.least < resume.most)
    return int((stop.offset - resume.offset)[moving].min()) if moving.any() else None


def make_parts(rows: int, keys: int, intervals: Intervals | None, sizes: Sizes) -> Iterator[Part]:
    """The parts of a call, each pair in one of them, in the order in which rows are to attend them.

    A window whose ends both move must have more keys than the smallest block has rows.
    """
    if intervals is None:
        yield from _below(range(rows), 0, Ramp(0, keys, keys), sizes)
        return
    for of_rows, lower, upper in _bands(intervals):
        if not lower.rises_over(of_rows):
            yield from _below(of_rows, lower.at(of_rows.start), upper, sizes)
            continue
        for start, stop in pairwise(sorted({of_rows.start, of_rows.stop, *lower.turns(of_rows), *upper.turns(of_rows)})):
            part = range(start, stop)
            if not lower.rises_over(part):
                yield from _below(part, lower.at(start), upper, sizes)
            elif not upper.rises_over(part):
                yield from _above(part, lower.offset, upper.at(start), sizes)
            else:
                yield from _window(part, lower.offset, upper.offset, sizes)


def _bands(intervals: Intervals) -> Iterator[tuple[range, Ramp, Ramp]]:
    """Rows, and two bounds between which they attend the keys: one or two for each document."""
    bounds = intervals.bounds
    ramps = (column for ramp in (bounds.stop, bounds.resume) for column in (ramp.offset, ramp.least, ramp.most))
    columns = bounds.edges[:-1], bounds.edges[1:], bounds.start, bounds.fixed, *ramps
    for first, last, start, fixed, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        if first == last:
            continue
        rows, stop, resume = range(first, last), Ramp(*numbers[:3]), Ramp(*numbers[3:])
        begin = Ramp(0, start, start)
        if resume.at(last - 1) <= fixed:
            yield rows, begin, stop  # no row has a hole
            continue
        if start < fixed:
            yield rows, begin, Ramp(stop.offset, min(stop.least, fixed), min(stop.most, fixed))
        yield rows, resume, stop


def _below(rows: range, start: int, upper: Ramp, sizes: Sizes) -> Iterator[Part]:
    """Row i attends the keys from `start` up to its bound."""
    if rows.start + upper.offset < upper.least > start:  # the limit binds: a prefix that all rows attend
        yield from _rectangle(rows, range(start, upper.least), sizes)
        start = upper.least
    moved = rows.start + upper.offset - start
    for tile in make_tiles(len(rows), max(0, upper.most - start), len(rows), sizes.keys, upper=moved):
        shape = Shape.LOWER if tile.triangular else Shape.FULL
        count, keys = tile.last_row - tile.first_row, tile.last_key - tile.first_key
        yield from _halve(Part(shape, rows.start + tile.first_row, count, start + tile.first_key, keys), sizes)


def _above(rows: range, offset: int, stop: int, sizes: Sizes) -> Iterator[Part]:
    """Row i attends keys [i + offset, stop): with rows and keys reversed, those up to a bound."""
    first, last = rows.start + offset, rows.stop - 1
    sizes = sizes._replace(triangle=sizes.upper_triangle)
    for part in _below(range(len(rows)), 0, Ramp(stop - offset - last, 0, max(0, stop - first)), sizes):
        row, key = rows.stop - part.row - part.rows, stop - part.key - part.keys
        yield Part(_MIRRORED[part.shape], row, part.rows, key, part.keys)


def _window(rows: range, lower: int, upper: int, sizes: Sizes) -> Iterator[Part]:
    """Row i attends keys [i + lower, i + upper)."""
    block = max(size for size in sizes.blocks if size < upper - lower)
    for first in range(rows.start, rows.stop, block):
        part = range(first, min(first + block, rows.stop))
        first_key, last_key = first + lower, first + upper - 1  # of the triangles
        yield from _above(part, lower, first_key + len(part), sizes)
        yield from _rectangle(part, range(first_key + len(part), last_key), sizes)
        yield Part(Shape.LOWER, first, len(part), last_key, len(part))


def _rectangle(rows: range, keys: range, sizes: Sizes) -> Iterator[Part]:
    for key in range(keys.start, keys.stop, sizes.keys):
        yield Part(Shape.FULL, rows.start, len(rows), key, min(sizes.keys, keys.stop - key))


def _halve(part: Part, sizes: Sizes) -> Iterator[Part]:
    """Cut a lower triangle into two smaller ones and a square."""
    shape, row, rows, key, _ = part
    if shape is Shape.FULL or rows <= sizes.triangle:
        yield part
        return
    half = round_up(rows // 2, sizes.triangle)
    yield from _halve(Part(shape, row, half, key, half), sizes)
    yield from _halve(Part(shape, row + half, rows - half, key + half, rows - half), sizes)
    yield Part(Shape.FULL, row + half, rows - half, key, half)
