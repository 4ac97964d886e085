"""Pictures of pooled maps: the colours of blocks, the tokens of axes, legible text, whole files, and nothing left behind."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from oocattn import ProblemError, ResultExistsError
from oocattn.drawing.figure import NO_WEIGHT, NOT_A_NUMBER, make_figure
from oocattn.drawing.grid import Axis, make_grid
from oocattn.drawing.pooled import MOST_PANELS, PooledBlocks, check_picture, draw_pooled, mean_weights


def causal_maps(heads: int, blocks: PooledBlocks, seed: int = 0) -> np.ndarray:
    """Random maps [H, R, C] of rows and keys that end together, whose rows of blocks sum to the rows in them."""
    shape = rows, keys = blocks.shape
    weights = np.random.default_rng(seed).random((heads, *shape)) * np.tri(rows, keys, keys - rows)
    whole = np.diff(np.minimum(np.arange(rows + 1) * blocks.row_block, blocks.rows))
    return np.float32(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9) * whole[:, None])


def names(count: int) -> list[str]:
    return [f"head {head}" for head in range(count)]


@functools.cache
def figure_of(heads: int, blocks: PooledBlocks) -> Figure:
    grid = make_grid(heads, (blocks.first_row, blocks.rows, blocks.row_block), (0, blocks.keys, blocks.key_block))
    figure = make_figure(grid, mean_weights(causal_maps(heads, blocks), grid.down, grid.across), names(heads))
    FigureCanvasAgg(figure).draw()
    return figure


def pixel(picture: np.ndarray, figure: Figure, panel: int, row: float, key: float) -> np.ndarray:
    """The colour of a picture at a place, in tokens, of a panel."""
    x, y = figure.axes[panel].transData.transform((key, row))
    return picture[len(picture) - 1 - int(y), int(x)]


SMALL = PooledBlocks(rows=10, keys=14, first_row=4, row_block=4, key_block=4)


def draw(pooled: np.ndarray, blocks: PooledBlocks, path: Path) -> np.ndarray:
    draw_pooled(pooled, blocks, path, names(len(pooled)))
    return imread(path)


def test_a_block_has_the_colour_of_its_mean_weight(tmp_path: Path) -> None:
    """On a logarithmic scale up to the largest, of as many rows and keys as a block at the end has."""
    means = np.array([[[1e-1, 0, 0, 0], [1e-2, 1e-2, 1e-3, 0], [1e-3, 1e-4, np.nan, 1e-3]]])
    pairs = np.outer([4, 4, 2], [4, 4, 4, 2])
    picture = draw(np.float32(means * pairs), SMALL, tmp_path / "a.png")
    figure, colours = figure_of(1, SMALL), matplotlib.colormaps["inferno"]
    low = float(np.quantile(means[means > 0], 0.01))
    for (row, key), mean in np.ndenumerate(means[0]):
        share = np.log(mean / low) / np.log(0.1 / low) if mean else 0
        expected = to_rgba(NOT_A_NUMBER) if np.isnan(mean) else colours(share) if mean else to_rgba(NO_WEIGHT)
        last = min(4 * row + 4, SMALL.rows) - 0.1, min(4 * key + 4, SMALL.keys) - 0.1
        for below, right in ((4 * row + 0.1, 4 * key + 0.1), last):
            np.testing.assert_allclose(pixel(picture, figure, 0, 4 + below, right), expected, atol=0.02)


def test_blocks_that_are_merged_have_the_mean_weight_of_their_rows_and_keys() -> None:
    """Of those that there are: the last blocks, and the last cells, are shorter."""
    down, across = Axis(first=5, count=23, size=3, merged=3, pixels=2), Axis(first=0, count=50, size=4, merged=5, pixels=2)
    weights = np.random.default_rng(1).random((2, 23, 50), np.float32)
    pooled = np.float32(
        [[[head[i : i + 3, j : j + 4].sum() for j in range(0, 50, 4)] for i in range(0, 23, 3)] for head in weights]
    )
    expected = [[[head[i : i + 9, j : j + 20].mean() for j in (0, 20, 40)] for i in (0, 9, 18)] for head in weights]
    np.testing.assert_allclose(mean_weights(pooled, down, across), expected, rtol=1e-6)


def test_a_column_of_one_block_is_seen_in_every_row_of_a_panel(tmp_path: Path) -> None:
    """Sinks: also in the first column, and where blocks are merged."""
    blocks = PooledBlocks(rows=4096, keys=4096, first_row=0, row_block=4, key_block=4)
    pooled = np.full((12, 1024, 1024), 1e-6, np.float32)
    pooled[5, :, [0, 700]] = 2
    picture, figure = draw(pooled, blocks, tmp_path / "a.png"), figure_of(12, blocks)
    extent = figure.axes[5].get_window_extent()
    top, left = len(picture) - round(extent.y1), round(extent.x0)
    panel = picture[top : top + round(extent.height), left : left + round(extent.width)]
    bright = (panel[..., :3].sum(-1) > 2).all(axis=0)
    assert list(np.flatnonzero(bright)) == [0, 1, 350, 351]


SHAPES = {
    "one": (1, PooledBlocks(65536, 65536, 0, 64, 64)),
    "one block": (1, PooledBlocks(1, 1, 0, 1, 1)),
    "tiny": (2, PooledBlocks(3, 5, 0, 1, 1)),
    "three": (3, PooledBlocks(2036, 2036, 0, 16, 16)),
    "seven": (7, PooledBlocks(300_000, 300_000, 0, 1000, 1000)),
    "twelve": (12, PooledBlocks(2**20, 2**20, 0, 2**12, 2**12)),
    "all": (MOST_PANELS, PooledBlocks(2**24, 2**24, 0, 2**16, 2**16)),
    "last rows": (4, PooledBlocks(64, 999_999, 999_935, 8, 4000)),
    "many rows of few keys": (1, PooledBlocks(2**30 + 8, 2**9, 2**33, 2**22, 1)),
}


@pytest.mark.parametrize(("heads", "blocks"), SHAPES.values(), ids=SHAPES.keys())
def test_every_head_has_a_panel_whose_axes_are_in_tokens(heads: int, blocks: PooledBlocks) -> None:
    figure = figure_of(heads, blocks)
    panels, (bar, swatch) = figure.axes[:heads], figure.axes[heads:]
    assert [axes.get_title(loc="left") for axes in panels] == names(heads)
    for axes in panels:
        assert axes.get_xlim() == (0, blocks.keys)
        assert axes.get_ylim() == (blocks.first_row + blocks.rows, blocks.first_row)  # downwards
        assert all(tick.is_integer() for tick in (*axes.get_xticks(), *axes.get_yticks()))
    at_the_left = {axes for axes in panels if any(label.get_text() for label in axes.get_yticklabels())}
    at_the_bottom = {axes for axes in panels if any(label.get_text() for label in axes.get_xticklabels())}
    places = {axes: (round(axes.get_position().x0, 5), round(axes.get_position().y0, 5)) for axes in panels}
    assert at_the_left == {axes for axes in panels if places[axes][0] == min(x for x, _ in places.values())}
    lowest = {x: min(y for other, y in places.values() if other == x) for x, _ in places.values()}
    assert at_the_bottom == {axes for axes in panels if places[axes][1] == lowest[places[axes][0]]}
    assert swatch.get_facecolor() == to_rgba(NO_WEIGHT)
    assert bar.get_yscale() == "log"


@pytest.mark.parametrize(("heads", "blocks"), SHAPES.values(), ids=SHAPES.keys())
def test_text_is_in_the_picture_and_does_not_overlap(heads: int, blocks: PooledBlocks) -> None:
    figure = figure_of(heads, blocks)
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert not [text for text, box in boxes if not box.x0 >= 0 <= box.y0 or not (box.max <= figure.bbox.max).all()]
    assert not [(one[0], other[0]) for one, other in itertools.combinations(boxes, 2) if one[1].overlaps(other[1])]


def drawn_texts(figure: Figure) -> Iterator[Text]:
    """Texts of the figure, titles, and labels of ticks within the limits."""
    yield from figure.texts
    for axes in figure.axes:
        yield axes._left_title
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            yield from (label for place, label in labels if low <= place <= high and label.get_text())


SETTINGS = {
    "dark": "dark_background",
    "ggplot": "ggplot",
    "TeX, and huge": {"text.usetex": True, "font.size": 40, "savefig.bbox": "tight", "savefig.dpi": 10, "axes.grid": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return draw(causal_maps(2, SMALL), SMALL, tmp_path_factory.mktemp("plain") / "a.png")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_picture_is_the_same_whatever_the_callers_settings(tmp_path: Path, settings: Any, plain: np.ndarray) -> None:
    with matplotlib.style.context(settings):
        before = matplotlib.rcParams.copy()
        np.testing.assert_array_equal(draw(causal_maps(2, SMALL), SMALL, tmp_path / "a.png"), plain)
        assert matplotlib.rcParams.copy() == before


def test_drawing_needs_no_pyplot_and_chooses_no_backend(tmp_path: Path) -> None:
    script = f"""
import sys, numpy, pathlib, matplotlib
from oocattn.drawing.pooled import PooledBlocks, draw_pooled
before = matplotlib.rcParams.copy()
draw_pooled(numpy.ones((1, 1, 1), "f4"), PooledBlocks(1, 1, 0, 1, 1), pathlib.Path({str(tmp_path / "a.png")!r}), ["all"])
assert matplotlib.rcParams.copy() == before and matplotlib.get_backend(auto_select=False) is None
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_map_without_weight_is_drawn_in_the_neutral_colour(tmp_path: Path) -> None:
    picture = draw(np.zeros((1, *SMALL.shape), np.float32), SMALL, tmp_path / "a.png")
    np.testing.assert_allclose(pixel(picture, figure_of(1, SMALL), 0, 5, 5), to_rgba(NO_WEIGHT), atol=0.01)


def test_only_a_picture_of_oocattn_is_replaced(tmp_path: Path) -> None:
    path, pooled = tmp_path / "a.png", causal_maps(1, SMALL)
    for _ in range(2):
        draw(pooled, SMALL, path)
    assert list(tmp_path.iterdir()) == [path]
    matplotlib.image.imsave(path, np.zeros((4, 4)))
    foreign = path.read_bytes()
    with pytest.raises(ResultExistsError, match="was not written by oocattn"):
        draw(pooled, SMALL, path)
    assert path.read_bytes() == foreign


def test_a_picture_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pooled = tmp_path / "a.png", causal_maps(1, SMALL)
    draw(pooled, SMALL, path)
    whole = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        draw(2 * pooled, SMALL, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many": ({"heads": 65}, r"a picture of 65 heads: expected 1 to 64; choose some of the heads, or their mean"),
    "none": ({"heads": 0}, "a picture of 0 heads"),
    "another shape": ({"blocks": PooledBlocks(10, 20, 4, 4, 4)}, r"are \[2, 3, 4\]: expected \[2, 3, 5\], for 2 heads, 10"),
    "no PNG": ({"name": "a.pdf"}, r"a\.pdf: expected the name of a file that ends in \.png"),
    "no folder": ({"name": "nowhere/a.png"}, "folder does not exist"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    heads = changed.get("heads", 2)
    pooled = np.ones((heads, *SMALL.shape), np.float32)
    with pytest.raises(ProblemError, match=message):
        draw_pooled(pooled, changed.get("blocks", SMALL), tmp_path / changed.get("name", "a.png"), names(heads))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_command_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "oocattn.drawing.figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProblemError, match=r"needs matplotlib.*pip install 'oocattn\[draw\]'"):
        check_picture(tmp_path / "a.png", 1)
