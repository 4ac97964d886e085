"""Parts of one shape that lie evenly apart, to be attended in one call of a library; pure integers.

A call of a library takes some 50 microseconds besides its work, as long as a triangle of 128 rows. The two triangles and the
square of a document of 1,024 rows are two calls, and of eight such documents in a row still two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from oocattn.kernels.shapes import Part, Shape
from oocattn.units import round_up


@dataclass(frozen=True)
class Run:
    """`count` parts like `first`, each `row_step` rows and `key_step` keys after the one before."""

    first: Part
    count: int = 1
    row_step: int = 0
    key_step: int = 0

    def part(self, index: int) -> Part:
        """One of the parts."""
        first = self.first
        return first._replace(row=first.row + index * self.row_step, key=first.key + index * self.key_step)

    @property
    def pairs(self) -> int:
        """Query-key pairs of a head that are attended."""
        first = self.first
        of_row = 2 * first.keys if first.shape is Shape.FULL else first.keys + 1
        return self.count * first.rows * of_row // 2

    @property
    def rows(self) -> range:
        """From the first row to the last of all parts."""
        return range(self.first.row, self.first.row + (self.count - 1) * self.row_step + self.first.rows)

    @property
    def keys(self) -> range:
        """From the first key to the last of all parts."""
        return range(self.first.key, self.first.key + (self.count - 1) * self.key_step + self.first.keys)


class Limits(NamedTuple):
    """The most rows and keys that are at hand at once, and the number to whose multiple the rows of a part are filled up."""

    rows: int
    keys: int
    row_quantum: int


@dataclass
class _Group:
    """Parts of one shape that have no row in common."""

    parts: list[Part] = field(default_factory=list)
    first_row: int = 0
    last_row: int = 0

    def meets(self, part: Part) -> bool:
        return self.first_row < part.row + part.rows and part.row < self.last_row

    def add(self, part: Part) -> None:
        stop = part.row + part.rows
        self.first_row = min(self.first_row, part.row) if self.parts else part.row
        self.last_row = max(self.last_row, stop) if self.parts else stop
        self.parts.append(part)


def make_runs(parts: Iterable[Part], limits: Limits) -> Iterator[tuple[range, list[Run]]]:
    """The rows of some parts, within the limit, and the runs that these parts are.

    Each row meets its parts in the order given. A rectangle of more rows than the limit is cut.
    """
    groups: list[_Group] = []
    first, last = 0, 0
    for part in parts:
        for piece in _cut(part, limits.rows):
            start, stop = piece.row, piece.row + round_up(piece.rows, limits.row_quantum)
            if groups and max(last, stop) - min(first, start) > limits.rows:
                yield range(first, last), _runs(groups, limits)
                groups = []
            first, last = (min(first, start), max(last, stop)) if groups else (start, stop)
            _add(groups, piece)
    if groups:
        yield range(first, last), _runs(groups, limits)


def _cut(part: Part, most: int) -> Iterator[Part]:
    """Cut a part to at most so many rows; one that is cut, to a multiple of 512: two threads' blocks, so that none waits."""
    start, stop = part.row, part.row + part.rows
    while start < stop:
        rows = min(most, stop - start)
        rows -= rows % 512 if rows > 512 and part.shape is Shape.FULL else 0
        yield part._replace(row=start, rows=rows)
        start += rows


def _add(groups: list[_Group], part: Part) -> None:
    """Add a part to the first group of its shape after all that its rows are to meet before, or to a new one."""
    after = max((index for index, group in enumerate(groups) if group.meets(part)), default=-1)
    for group in groups[after + 1 :]:
        like = group.parts[0]
        if (like.shape, like.rows, like.keys) == (part.shape, part.rows, part.keys):
            group.add(part)
            return
    groups.append(_Group())
    groups[-1].add(part)


def _runs(groups: Iterable[_Group], limits: Limits) -> list[Run]:
    return [run for group in groups for run in _evenly_apart(sorted(group.parts, key=lambda part: part.row), limits.keys)]


def _evenly_apart(parts: list[Part], most_keys: int) -> Iterator[Run]:
    """Cut ascending parts into runs whose keys are within the limit."""
    run = Run(parts[0])
    for part in parts[1:]:
        last = run.part(run.count - 1)
        steps = (part.row - last.row, part.key - last.key)
        longer = Run(run.first, run.count + 1, *steps)
        even = run.count == 1 or steps == (run.row_step, run.key_step)
        if even and steps[1] >= 0 and len(longer.keys) <= most_keys:
            run = longer
        else:
            yield run
            run = Run(part)
    yield run
