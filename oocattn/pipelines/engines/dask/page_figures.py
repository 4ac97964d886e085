"""The figures of a run's page, made with bokeh from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.core.properties import value
from bokeh.models import BasicTicker, ColumnDataSource, CustomJSTickFormatter, FixedTicker, HoverTool
from bokeh.plotting import figure

from oocattn.pipelines.engines.dask.page_words import COLOURS
from oocattn.units import format_bytes, format_count

LANE_COLOURS = ("#4e79a7", "#76b7b2", "#e15759", "#f28e2b", "#b07aa1", "#edc948", "#59a14f")  # as the timeline's
LINES = {"read": "#4e79a7", "copied in": "#76b7b2", "copied out": "#f28e2b", "written": "#59a14f", "saved": "#b07aa1"}

_PREFIXED = """
const step = base == 10 ? 1000 : 1024;
let power = 0;
while (tick >= step && power < 5) { tick /= step; power += 1; }
return (+tick.toPrecision(4)) + " " + ["", "k", "M", "G", "T", "P"][power] + (base == 10 || !power ? "" : "i");
"""  # of a tick: a number with its prefix
_MANTISSAS = {10: [1, 2, 5], 1024: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}

Record = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def _colour(name: str) -> Floats:
    """Red, green and blue of a colour such as #2a6fb0."""
    return np.array([int(name[first : first + 2], 16) for first in (1, 3, 5)], np.float64)


def _pixels(colours: Floats) -> npt.NDArray[np.uint32]:
    """Opaque pixels of colours [rows, columns, 3]."""
    pixels = np.full((*colours.shape[:2], 4), 255, np.uint8)
    pixels[..., :3] = np.rint(colours)
    return pixels.view(np.uint32)[..., 0]


def _image_source(**columns: Any) -> ColumnDataSource:
    return ColumnDataSource({"image": [np.zeros((1, 1), np.uint32)], "dw": [1.0], "dh": [1.0], **columns})


def _bare(title: str, **options: Any) -> Any:
    """A figure without tools on the screen."""
    made: Any = figure(title=title, toolbar_location=None, tools="", **options)
    made.title.text_font_size = "14px"
    made.grid.grid_line_color = "#e5e5e5"
    return made


class Matrix:
    """The chunk pairs of the current head group, and all head groups as a strip."""

    def __init__(self) -> None:
        arrays = {name: [np.zeros((1, 1), np.int64)] for name in ("live", "done", "in_flight")}
        self.source = _image_source(**arrays)
        self.source.name = "matrix"
        self.strip_source = _image_source(share=[np.zeros((1, 1))])
        self.strip_source.name = "strip"
        self.figure = _bare("chunk pairs", width=430, height=430, x_axis_label="key chunk", y_axis_label="query chunk")
        self.figure.image_rgba(image="image", x=0, y=0, dw="dw", dh="dh", source=self.source)
        tips = [("live pairs", "@live"), ("done", "@done"), ("in flight", "@in_flight")]
        self.figure.add_tools(HoverTool(tooltips=tips))
        self.strip = _bare("head groups", width=130, height=430)
        self.strip.image_rgba(image="image", x=0, y=0, dw="dw", dh="dh", source=self.strip_source)
        self.strip.add_tools(HoverTool(tooltips=[("done", "@share{0.0%}")]))
        self.strip.xaxis.visible = False
        self.strip.yaxis.ticker = BasicTicker(min_interval=1)
        for drawn in (self.figure, self.strip):
            drawn.grid.visible = False
            drawn.y_range.flipped = True
            for span in (drawn.x_range, drawn.y_range):
                span.range_padding = 0

    def update(self, record: Record) -> None:
        """Draw what is done."""
        matrix = record["matrix"]
        counts = {name: np.array(matrix[name], np.int64) for name in ("live", "done", "in_flight")}
        height, width = (float(matrix[name]) for name in ("query_chunks", "key_chunks"))
        self.source.data = {
            "image": [_pixels(_mixed(**counts))],
            "dw": [width],
            "dh": [height],
            **{name: [values] for name, values in counts.items()},
        }
        groups = record["head_groups"]
        self.figure.title.text = f"chunk pairs of head group {matrix['head_group']:,} (0 to {groups - 1:,})"
        share = np.array(record["strip"])[:, None]
        colours = _colour(COLOURS["left"]) + share[..., None] * (_colour(COLOURS["done"]) - _colour(COLOURS["left"]))
        self.strip_source.data = {"image": [_pixels(colours)], "dw": [1.0], "dh": [float(groups)], "share": [share]}


def _mixed(live: Any, done: Any, in_flight: Any) -> Floats:
    """The colour of each cell: those of its live pairs, mixed."""
    parts = {"done": done, "in flight": in_flight, "left": live - done - in_flight}
    mixed = sum(count[..., None] * _colour(COLOURS[kind]) for kind, count in parts.items()) / np.maximum(1, live)[..., None]
    return np.where(live[..., None] > 0, mixed, _colour(COLOURS["masked"]))


class RateLines:
    """Rates over time: tokens, floating-point operations against the kernel's ceiling, bytes."""

    def __init__(self) -> None:
        self.source = ColumnDataSource(
            {name: [] for name in ("seconds", "tokens", "flops", "ceiling", *LINES)}, name="rates"
        )
        self.tokens, self.flops, self.bytes = (
            _bare(title, height=150, sizing_mode="stretch_width", min_width=300)
            for title in ("tokens/s", "FLOP/s", "bytes/s")
        )
        self.tokens.line("seconds", "tokens", source=self.source, line_width=2, color=COLOURS["done"])
        self.flops.line("seconds", "flops", source=self.source, line_width=2, color="#f28e2b")
        self.flops.line("seconds", "ceiling", source=self.source, line_dash="dashed", color="#555555")
        self._lines = {
            name: self.bytes.line("seconds", name, source=self.source, line_width=2, color=colour, legend_label=name)
            for name, colour in LINES.items()
        }
        self.bytes.add_layout(self.bytes.legend[0], "right")
        for name, chosen in {"label_text_font_size": "11px", "spacing": 0, "padding": 2, "glyph_height": 14}.items():
            setattr(self.bytes.legend, name, chosen)
        self.bytes.legend.label_height = 14
        for drawn, base in ((self.tokens, 10), (self.flops, 10), (self.bytes, 1024)):
            drawn.yaxis.formatter = CustomJSTickFormatter(code=_PREFIXED, args={"base": base})
            drawn.yaxis.ticker = BasicTicker(base=base, mantissas=_MANTISSAS[base])
            drawn.min_border_left = 60
            drawn.y_range.start = 0
            drawn.x_range.range_padding = 0
        self.bytes.xaxis.axis_label = "seconds since start or resume"

    def update(self, record: Record) -> None:
        """Draw the rates up to now."""
        rates = record["rates"]
        series, width, ceiling = rates["series"], rates["width"], rates["ceiling"]
        count = len(series["tokens"])
        self.source.data = {
            "seconds": np.arange(1, count + 1) * width,
            "ceiling": np.full(count, ceiling),
            "tokens": np.array(series["tokens"]),
            "flops": np.array(series["flops"]),
            **{name: np.array(series.get(name, [0.0] * count)) for name in LINES},
        }
        last = {name: values[-1] if values else 0.0 for name, values in series.items()}
        for item, (name, line) in zip(self.bytes.legend[0].items, self._lines.items(), strict=True):
            item.visible = line.visible = name in series
            item.label = value(f"{name} {format_bytes(last.get(name, 0.0))}/s")
        self.tokens.title.text = f"tokens/s: {last['tokens']:,.0f}"
        share = last["flops"] / ceiling
        self.flops.title.text = f"{format_count(last['flops'])}FLOP/s: {share:.0%} of the kernel's rate"


class Lanes:
    """How busy each resource of each lane was over the last minute."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = list(order)
        self.source = _image_source(busy=[np.zeros((1, 1))])
        self.source.name = "lanes"
        self.figure = _bare("lanes", height=200, sizing_mode="stretch_width", min_width=300)
        self.figure.image_rgba(image="image", x="x", y=0, dw="dw", dh="dh", source=self.source)
        self.source.data["x"] = [0.0]
        self.figure.add_tools(HoverTool(tooltips=[("busy", "@busy{0%}")]))
        self.figure.grid.visible = False
        self.figure.y_range.flipped = True
        self._ticker = FixedTicker(ticks=[])
        self.figure.yaxis.ticker = self._ticker
        for span in (self.figure.x_range, self.figure.y_range):
            span.range_padding = 0

    def update(self, record: Record) -> None:
        """Draw the last minute. No model is replaced: bokeh would walk through all of the document."""
        lanes = record["lanes"]
        rows, seconds = lanes["rows"], lanes["seconds"]
        busy = np.array([row["cells"] for row in rows]) if rows else np.zeros((1, 1))
        names = [row["resource"] for row in rows] or [self._order[0]]
        full = np.array([_colour(LANE_COLOURS[self._order.index(name) % len(LANE_COLOURS)]) for name in names])
        colours = 246 + busy[..., None] * (full[:, None] - 246)
        self.source.data = {
            "image": [_pixels(colours)],
            "x": [-seconds],
            "dw": [seconds],
            "dh": [float(len(busy))],
            "busy": [busy],
        }
        labels = {index + 0.5: f"{row['lane']}: {row['resource']} {row['share']:.0%}" for index, row in enumerate(rows)}
        self._ticker.ticks = list(labels)
        self.figure.yaxis.major_label_overrides = labels
        self.figure.height = 70 + 22 * max(1, len(rows))
        self.figure.title.text = f"lanes: busy over {seconds:.3g} s up to the last task that ended"
