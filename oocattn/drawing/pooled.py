"""Pooled maps of attention weights as a picture: a panel for each head, in one scale of colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oocattn.drawing.grid import Axis, make_grid
from oocattn.errors import ProblemError
from oocattn.storage.files.outputs import PNG_MARK, check_output, write_output
from oocattn.units import ceil_div

MOST_PANELS = 64


@dataclass(frozen=True)
class PooledBlocks:
    """The tokens of a pooled map, and its blocks, of which the last ones may be shorter.

    `rows` rows, the first of which is token `first_row`, in blocks of `row_block`; `keys` keys in blocks of `key_block`.
    """

    rows: int
    keys: int
    first_row: int
    row_block: int
    key_block: int

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks of rows and of keys."""
        return ceil_div(self.rows, self.row_block), ceil_div(self.keys, self.key_block)


def check_picture(file: Path, panels: int) -> None:
    """Raise as `draw_pooled` where a picture of `panels` heads cannot be drawn to `file`, before they are computed."""
    if file.suffix.lower() != ".png":
        raise ProblemError(f"picture {file}: expected the name of a file that ends in .png, like heads.png")
    if not 1 <= panels <= MOST_PANELS:
        raise ProblemError(
            f"a picture of {panels} heads: expected 1 to {MOST_PANELS}; choose some of the heads, or their mean"
        )
    check_output(file)
    try:
        import oocattn.drawing.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ProblemError(
            f"drawing needs matplotlib, which cannot be imported ({error}): pip install 'oocattn[draw]'"
        ) from error


def draw_pooled(pooled: NDArray[np.float32], blocks: PooledBlocks, file: Path, heads: Sequence[str]) -> None:
    """Draw pooled maps [H, R, C] of `heads` as a PNG, atomically.

    The colour of a block is the mean weight of its pairs of a row and a key, on a logarithmic scale that all heads share;
    pairs that are masked count as 0. Where a panel has fewer pixels than blocks, neighbours are merged. Settings of
    matplotlib are its defaults while it draws, and then the caller's again.

    Raises ProblemError where matplotlib is missing, for more than `MOST_PANELS` heads, for a map that has not the shape of
    `blocks`, and for a name that does not end in .png; else as `check_output`.
    """
    check_picture(file, len(heads))
    if pooled.shape != (len(heads), *blocks.shape):
        raise ProblemError(
            f"pooled maps are {list(pooled.shape)}: expected {[len(heads), *blocks.shape]}, for {len(heads)} heads, "
            f"{blocks.rows} rows in blocks of {blocks.row_block}, and {blocks.keys} keys in blocks of {blocks.key_block}"
        )
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from oocattn.drawing.figure import make_figure

    grid = make_grid(len(heads), (blocks.first_row, blocks.rows, blocks.row_block), (0, blocks.keys, blocks.key_block))
    means = mean_weights(pooled, grid.down, grid.across)
    content = io.BytesIO()
    with matplotlib.style.context("default"):
        figure = make_figure(grid, means, heads)
        FigureCanvasAgg(figure).print_figure(content, format="png", metadata={"Comment": PNG_MARK})
    write_output(file, lambda opened: opened.buffer.write(content.getvalue()))


def mean_weights(pooled: NDArray[np.float32], down: Axis, across: Axis) -> NDArray[np.float64]:
    """The mean weight, per row and key, of each cell of pooled maps [H, R, C]."""
    rows, keys = (np.arange(0, blocks, axis.merged) for blocks, axis in zip(pooled.shape[1:], (down, across), strict=True))
    pairs = np.outer(np.diff(rows * down.size, append=down.count), np.diff(keys * across.size, append=across.count))
    sums = (np.add.reduceat(head, rows, axis=0, dtype=np.float64) for head in pooled)
    return np.stack([np.add.reduceat(each, keys, axis=1) / pairs for each in sums])
