"""The figure of pooled maps, laid out in whole pixels, so that all cells of a panel have the same size."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from oocattn.drawing.grid import Grid, explain_suffixes, format_tokens, token_ticks
from oocattn.text import printable

NO_WEIGHT = "#d5dae1"
"""The colour of cells without weight: what the mask leaves out, and weights that are 0 in float32."""

NOT_A_NUMBER = "#00c8d7"

_COLOURS = "inferno"
_DECADES = 6  # below the largest weight, in which weights have colours of their own

_DOTS = 200  # pixels an inch
_FONT, _SMALL, _THIN = 9.5, 8.0, 0.72  # points: text, labels of ticks, lines
_INK, _MARKS = "#1f2328", "#6e7781"

_LETTER = round(0.62 * _FONT * _DOTS / 72)  # pixels of a letter or digit at most, on average
_LINE = round(1.5 * _FONT * _DOTS / 72)  # and of a line of text
_MARGIN, _GAP, _MARK = 36, 52, 24  # around everything, between panels, a tick mark with the space around it
_BAR, _LONGEST_BAR, _BAR_ZONE = 34, 1024, 270  # the colour bar, and the width of the legend
_STEP, _MOST_STEPS = 112, 8  # pixels between ticks at least, and such steps at most


class _Page:
    """A figure for the panels of a grid, with places in pixels from its upper left corner."""

    def __init__(self, grid: Grid, row_labels: Sequence[str], caption: str) -> None:
        self.grid = grid
        self.inner_width = grid.columns * (grid.across.length + _GAP) - _GAP
        self.inner_height = grid.rows * (grid.down.length + _LINE + _GAP) - _LINE - _GAP
        lines = textwrap.wrap(caption, self.inner_width // _LETTER)
        self.left = _MARGIN + _LINE + _MARK + max(map(len, row_labels), default=0) * _LETTER
        self.top = _MARGIN + (len(lines) + 1) * _LINE + _GAP // 2
        self.width = self.left + self.inner_width + _GAP + _BAR_ZONE
        self.height = self.top + self.inner_height + _MARK + 2 * _LINE + _MARGIN
        self.figure = Figure(figsize=(self.width / _DOTS, self.height / _DOTS), dpi=_DOTS)
        self.write(self.left, _MARGIN, "\n".join(lines))

    def corner(self, panel: int) -> tuple[int, int]:
        """The left upper corner of a panel."""
        row, column = divmod(panel, self.grid.columns)
        across, down = self.grid.across.length + _GAP, self.grid.down.length + _LINE + _GAP
        return self.left + column * across, self.top + row * down

    def add_axes(self, left: int, top: int, width: int, height: int) -> Axes:
        """Axes at a place, without a frame: it would cover the first keys, where sinks are."""
        bottom = self.height - top - height
        axes = self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))
        axes.spines[:].set_visible(False)
        axes.tick_params("both", which="both", labelsize=_SMALL, width=_THIN, color=_MARKS, labelcolor=_INK)
        return axes

    def write(self, left: int, top: int, text: str, **options: Any) -> None:
        """Write text whose left upper corner is there, unless options say otherwise."""
        given = {"verticalalignment": "top", "linespacing": 1.5, "size": _FONT, "color": _INK, **options}
        self.figure.text(left / self.width, 1 - top / self.height, text, **given)


def make_figure(grid: Grid, means: NDArray[np.float64], heads: Sequence[str]) -> Figure:
    """The figure of the mean weights [H, R, C] of cells. Its axes are the panels, as `heads`, then those of the legend."""
    down, across = grid.down, grid.across
    rows, keys = (token_ticks(axis.limits, min(axis.length // _STEP, _MOST_STEPS)) for axis in (down, across))
    row_labels, key_labels = format_tokens(rows), format_tokens(keys)
    page = _Page(grid, row_labels, _caption(grid))
    norm = LogNorm(*weight_range(means))
    for panel, (name, values) in enumerate(zip(heads, means, strict=True)):
        axes = page.add_axes(*page.corner(panel), across.length, down.length)
        _paint(axes, grid, cell_colours(values, norm))
        axes.set_yticks(rows, row_labels if panel % grid.columns == 0 else [""] * len(rows))
        axes.set_xticks(keys, key_labels if grid.is_lowest(panel) else [""] * len(keys))
        title = _shortened(printable(name), (across.length + _GAP) // _LETTER)
        axes.set_title(title, loc="left", size=_FONT, color=_INK, pad=5, parse_math=False)
    _name_axes(page, row_labels, key_labels)
    _add_legend(page, norm, means)
    return page.figure


def _paint(axes: Axes, grid: Grid, colours: NDArray[np.uint8]) -> None:
    """Show the colours [R, C, 4] of cells. The last ones may reach beyond the last token, where they are cut."""
    (top, bottom), (left, right) = grid.down.limits, grid.across.limits
    cells_down, cells_across, _ = colours.shape
    extent = (left, left + cells_across * grid.across.cell, top + cells_down * grid.down.cell, top)
    axes.imshow(colours, extent=extent, aspect="auto", interpolation="nearest")
    axes.set(xlim=(left, right), ylim=(bottom, top))


def weight_range(means: NDArray[np.float64]) -> tuple[float, float]:
    """The range of colours: 1 to `_DECADES` decades up to the largest weight, from one that 99% of the weights exceed."""
    positive = means[means > 0]
    if not positive.size:
        return 10.0**-_DECADES, 1.0
    top = float(positive.max())
    return min(max(float(np.quantile(positive, 0.01)), top / 10**_DECADES), top / 10), top


def cell_colours(means: NDArray[np.float64], norm: LogNorm) -> NDArray[np.uint8]:
    """Colours [R, C, 4] of cells."""
    exist = means > 0
    colours = np.empty((*means.shape, 4), np.uint8)
    colours[exist] = colormaps[_COLOURS](norm(means[exist]), bytes=True)
    colours[~exist] = np.rint(255 * np.array(to_rgba(NO_WEIGHT)))
    colours[np.isnan(means)] = np.rint(255 * np.array(to_rgba(NOT_A_NUMBER)))
    return colours


def _name_axes(page: _Page, row_labels: Sequence[str], key_labels: Sequence[str]) -> None:
    rows, keys = f"row token{explain_suffixes(row_labels)}", f"key token{explain_suffixes(key_labels)}"
    middle, centre = page.left + page.inner_width // 2, page.top + page.inner_height // 2
    page.write(middle, page.height - _MARGIN - _LINE, keys, horizontalalignment="center")
    page.write(_MARGIN, centre, rows, rotation="vertical", verticalalignment="center")


def _add_legend(page: _Page, norm: LogNorm, means: NDArray[np.float64]) -> None:
    """The scale of colours, with its unit above it, and below it the colours that are not on the scale."""
    left = page.left + page.inner_width + _GAP
    page.write(left, page.top - _LINE, "mean weight per\nrow and key", verticalalignment="bottom")
    others = [("no weight", NO_WEIGHT)] + [("NaN", NOT_A_NUMBER)] * bool(np.isnan(means).any())
    step = _BAR + _GAP // 2
    height = min(page.inner_height - len(others) * step, _LONGEST_BAR)
    below = (norm(means[means > 0]) < 0).any()
    bar = page.figure.colorbar(
        ScalarMappable(norm, _COLOURS), cax=page.add_axes(left, page.top, _BAR, height), extend="min" if below else "neither"
    )
    bar.outline.set(linewidth=_THIN, edgecolor=_MARKS)
    for number, (words, colour) in enumerate(others):
        top = page.top + height + number * step + _GAP // 2
        page.add_axes(left, top, _BAR, _BAR).set(facecolor=colour, xticks=[], yticks=[])
        page.write(left + _BAR + _MARK, top + _BAR // 2, words, verticalalignment="center_baseline", size=_SMALL)


def _caption(grid: Grid) -> str:
    down, across = grid.down, grid.across
    return f"{down.count:,} by {across.count:,} (rows by keys), in cells of {down.cell:,} by {across.cell:,}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
