"""Where the panels of a picture are, in pixels, and the tokens at which their axes have ticks. Nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oocattn.units import ceil_div, round_up

_TOTAL, _SMALLEST, _LARGEST = 2048, 224, 1400
"""Pixels, about: all panels side by side or one below the other; a side of a panel at least, and at most."""

_LONGEST = 3.0  # how much longer one side of a panel is than the other, at most
_SHAPE = 4 / 3  # width to height of all panels together, as near as they come

_KIBI, _MEBI = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Axis:
    """One axis of every panel: `count` tokens from `first` on, in blocks of `size`, of which the last may be shorter.

    `merged` blocks are one cell, which is `pixels` long.
    """

    first: int
    count: int
    size: int
    merged: int
    pixels: int

    @property
    def cell(self) -> int:
        """Tokens of a cell."""
        return self.size * self.merged

    @property
    def length(self) -> int:
        """Pixels of a panel."""
        return max(1, round(self.count / self.cell * self.pixels))

    @property
    def limits(self) -> tuple[int, int]:
        """The first token, and the one after the last."""
        return self.first, self.first + self.count


@dataclass(frozen=True)
class Grid:
    """Panels in columns, row by row, with the axes that all of them have."""

    panels: int
    columns: int
    down: Axis
    across: Axis

    @property
    def rows(self) -> int:
        """Rows of panels; the last may be shorter."""
        return ceil_div(self.panels, self.columns)

    def is_lowest(self, panel: int) -> bool:
        """Whether no panel is below this one."""
        return panel + self.columns >= self.panels


def make_grid(panels: int, down: tuple[int, int, int], across: tuple[int, int, int]) -> Grid:
    """The grid of `panels` panels, near square. `down` and `across` are the first token, tokens and size of a block."""
    ratio = min(max(across[1] / down[1], 1 / _LONGEST), _LONGEST)
    columns = min(range(1, panels + 1), key=lambda columns: _misfit(panels, columns, ratio))
    wide, high = min(1.0, ratio), min(1.0, 1 / ratio)
    longer = min(_TOTAL / max(columns * wide, ceil_div(panels, columns) * high), _LARGEST)
    width, height = (max(_SMALLEST, round(longer * side)) for side in (wide, high))
    return Grid(panels, columns, _axis(*down, height), _axis(*across, width))


def _misfit(panels: int, columns: int, ratio: float) -> float:
    """How far a grid is from the shape that it should have, and how much of it stays empty."""
    rows = ceil_div(panels, columns)
    return abs(math.log(columns / rows * ratio / _SHAPE)) + 3 * (rows * columns - panels) / panels


def _axis(first: int, count: int, size: int, length: int) -> Axis:
    """An axis of about `length` pixels. Blocks are merged until each cell has two: a line of one pixel is easily missed."""
    blocks = count / size
    merged = max(1, round(2 * blocks / length))
    return Axis(first, count, size, merged, max(2, round(length * merged / blocks)))


def token_ticks(limits: tuple[int, int], most: int) -> list[int]:
    """Tokens within the limits at multiples of a power of two, with at most `most` steps between them."""
    start, stop = limits
    step = 1
    while stop - start > most * step:
        step *= 2
    return list(range(round_up(start, step), stop + 1, step))


def format_tokens(tokens: Sequence[int]) -> list[str]:
    """Tokens as text: `512`, `1,024`, or, where all are multiples of 1,024, `64K` and `3M`, as oocattn reads sizes."""
    if any(token % _KIBI for token in tokens):
        return [f"{token:,}" for token in tokens]
    return [_with_suffix(token) for token in tokens]


def _with_suffix(token: int) -> str:
    if token == 0:
        return "0"
    return f"{token // _KIBI:,}K" if token % _MEBI else f"{token // _MEBI:,}M"


def explain_suffixes(labels: Sequence[str]) -> str:
    """What the suffixes of labels mean, to stand behind the name of their axis; "" where they have none."""
    if any(label.endswith("M") for label in labels):
        return " (K = 1,024, M = 1,024K)"
    return " (K = 1,024)" if any(label.endswith("K") for label in labels) else ""
