"""Timeline: which resource was busy when, as a trace and as a picture.

The trace is in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open; its definition is
"Trace Event Format" by Chromium's catapult project. How spans are measured is the lane's business.
"""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from array import array
from collections.abc import Iterable, Iterator
from html import escape
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO, cast, get_args

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.pipelines.watch.events import Ended, Event, Failed, Merged, Resource, Span, Started, TaskEvent, Written
from oocattn.storage.files.operations import words_of
from oocattn.storage.files.outputs import JSON_MARK, SVG_MARK, check_output, write_output
from oocattn.storage.locations import output_path
from oocattn.text import display_width, printable
from oocattn.units import format_seconds

RESOURCES: tuple[Resource, ...] = get_args(Resource)  # every resource, in the order in which bytes pass through

MOST_CELLS = 30_000  # cells of the picture, of 25 bytes, over all rows: its file stays below 1 MB

_COLOURS = ("#4e79a7", "#76b7b2", "#e15759", "#f28e2b", "#b07aa1", "#edc948", "#59a14f")
_SHADES = 4  # a cell is drawn as dark as it is busy, in quarters
_WIDTH, _ROW, _LEFT, _RIGHT, _LINE = 1000, 22, 190, 70, 20
_CELL, _CAPTION_CELL = 8.5, 9.6  # the width of a character at most, in a monospaced font of size 13, and of 15
_MOST_NAME = 100  # characters of a worker's name; of a longer one the middle is left out

Floats = NDArray[np.float64]


def busy_seconds(spans: Iterable[Span]) -> float:
    """Seconds in which at least one span was under way: their union's length."""
    seconds, reached = 0.0, -math.inf
    for span in sorted(spans, key=attrgetter("start")):
        if span.stop > max(span.start, reached):
            seconds += span.stop - max(span.start, reached)
            reached = span.stop
    return seconds


def _union(starts: Floats, stops: Floats) -> tuple[Floats, Floats]:
    """The intervals' union as ascending intervals that neither touch nor are empty."""
    order = np.argsort(starts, kind="stable")
    order = order[starts[order] < stops[order]]
    starts, reached = starts[order], np.maximum.accumulate(stops[order])
    first = np.ones(len(starts), dtype=bool)
    first[1:] = starts[1:] > reached[:-1]
    return starts[first], reached[np.append(first[1:], True)[: len(first)]]


class _Spans:
    """The spans of one resource of a lane, 33 bytes each: there may be a million."""

    def __init__(self) -> None:
        self.starts, self.stops = array("d"), array("d")
        self.head_groups, self.indices = array("q"), array("q")
        self.chunks = array("b")  # 1 where the index counts chunks, 0 where it counts subproblems

    def add(self, event: TaskEvent, span: Span) -> None:
        self.starts.append(span.start)
        self.stops.append(max(span.start, span.stop))
        self.head_groups.append(event.head_group)
        self.indices.append(event.index)
        self.chunks.append(isinstance(event, Merged | Written))


class Timeline:
    """A listener that writes a trace to `path`, and a picture (.svg) beside it, when the run ends, or warns if it cannot.

    The trace has a process for each lane and a thread for each resource, and further ones ("read 2") where its spans
    overlap. The picture has a row for each resource of each lane, with the share of the wall time in which it was busy.

    Raises ResultExistsError where something is at either path that oocattn did not write, and ProblemError where the folder
    of `path` does not exist or cannot be written to, or `path` does not end in .json.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = output_path(path, "timeline")
        check_output(self.path)
        if self.path.suffix.lower() != ".json":
            raise ProblemError(f"timeline {self.path}: expected the name of a file that ends in .json, like timeline.json")
        self.picture = self.path.with_suffix(".svg")
        check_output(self.picture)
        self._begin("", 0.0)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._begin(str(event.plan.problem), event.start)
        elif isinstance(event, TaskEvent):
            for span in event.spans:
                self._rows.setdefault((event.worker, span.resource), _Spans()).add(event, span)
        elif isinstance(event, Ended | Failed):
            self._write(event)

    def _begin(self, caption: str, start: float) -> None:
        self._caption, self._start = caption, start
        self._rows: dict[tuple[str, str], _Spans] = {}

    def _write(self, event: Event) -> None:
        rows = {place: self._rows[place] for place in sorted(self._rows, key=_order)}
        wall = event.stop - self._start
        start = min([self._start, *(min(spans.starts) for spans in rows.values())])  # another host's clock may be early
        stop = max([event.stop, *(max(spans.stops) for spans in rows.values())])
        words = "failed after" if isinstance(event, Failed) else "in"
        caption = f"{self._caption}, {words} {format_seconds(wall)}"
        try:
            write_output(self.path, lambda file: _write_trace(file, rows, start))
            write_output(self.picture, lambda file: file.writelines(_picture(rows, caption, start, stop, wall)))
        except (OSError, ProblemError) as error:
            warnings.warn(f"the timeline was not written: {words_of(error)}", stacklevel=2)


def _order(place: tuple[str, str]) -> tuple[int, str, int]:
    """Lanes by name, 2 before 10, and then resources as bytes pass through them."""
    worker, resource = place
    return len(worker), worker, RESOURCES.index(cast(Resource, resource))


def _write_trace(file: TextIO, rows: dict[tuple[str, str], _Spans], start: float) -> None:
    """One event a line: the names of a thread, then its spans in order of time."""
    file.write(f'{JSON_MARK}"displayTimeUnit": "ms", "traceEvents": [\n')
    file.writelines(
        f"{',' if number else ''}{json.dumps(event, separators=(',', ':'))}\n"
        for number, event in enumerate(_trace(rows, start))
    )
    file.write("]}\n")


def _trace(rows: dict[tuple[str, str], _Spans], start: float) -> Iterator[dict[str, Any]]:
    workers = list(dict.fromkeys(worker for worker, _ in rows))
    for process, worker in enumerate(workers, 1):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"lane {worker}"}}
    threads = len(workers)  # viewers take a thread of its process's number for the main one
    for (worker, resource), spans in rows.items():
        process, tracks = workers.index(worker) + 1, _tracks(spans)
        for number, track in enumerate(tracks, 1):
            threads += 1
            place = {"pid": process, "tid": threads}
            name = resource if number == 1 else f"{resource} {number}"
            yield {"ph": "M", "name": "thread_name", **place, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": threads}}
            yield from (_slice(spans, index, resource, start) | place for index in track)


def _tracks(spans: _Spans) -> list[list[int]]:
    """Divide the spans, by index, in order of time into tracks without overlap."""
    tracks: list[list[int]] = []
    for index in np.argsort(np.asarray(spans.starts), kind="stable").tolist():
        free = (track for track in tracks if spans.stops[track[-1]] <= spans.starts[index])
        track = next(free, None)
        if track is None:
            tracks.append(track := [])
        track.append(index)
    return tracks


def _slice(spans: _Spans, index: int, resource: str, start: float) -> dict[str, Any]:
    """A complete event; its microseconds are rounded so that neighbours stay apart."""
    begin, end = (round((moment - start) * 1e9) for moment in (spans.starts[index], spans.stops[index]))
    counted = "chunk" if spans.chunks[index] else "subproblem"
    return {
        "ph": "X",
        "name": f"{counted} {spans.indices[index]}",
        "cat": resource,
        "ts": begin / 1e3,
        "dur": (end - begin) / 1e3,
        "args": {"head group": spans.head_groups[index], counted: spans.indices[index]},
    }


def _picture(rows: dict[tuple[str, str], _Spans], caption: str, start: float, stop: float, wall: float) -> Iterator[str]:
    """The lines of an SVG file: a row for each resource, time across, share at right."""
    labels = [printable(f"lane {_shorten(worker)}: {resource}") for worker, resource in rows]
    left = max([_LEFT, *(math.ceil(_CELL * display_width(label)) + 16 for label in labels)])
    width = left + _WIDTH + _RIGHT
    lines = textwrap.wrap(printable(caption), int((width - 20) / _CAPTION_CELL))
    top = _LINE * len(lines) + 30
    height = top + _ROW * max(1, len(rows)) + 40
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="monospace" font-size="13">{SVG_MARK}<rect width="100%" height="100%" fill="white"/>\n'
    )
    for number, line in enumerate(lines, 1):
        yield f'<text x="10" y="{_LINE * number}" font-size="15">{escape(line)}</text>\n'
    yield f'<text x="{left + _WIDTH + 8}" y="{top - 6}">busy</text>\n'
    yield from _axis(stop - start, left, top, height - 40)
    columns = max(1, min(_WIDTH, MOST_CELLS // max(1, len(rows))))
    edges = np.linspace(start, stop, columns + 1)
    for number, ((_, resource), spans) in enumerate(rows.items()):
        starts, stops = _union(np.asarray(spans.starts), np.asarray(spans.stops))
        share = float((stops - starts).sum()) / wall if wall > 0 else 0.0
        colour = _COLOURS[RESOURCES.index(cast(Resource, resource))]
        row = top + _ROW * number
        yield (
            f'<text x="{left - 8}" y="{row + 15}" text-anchor="end">{escape(labels[number])}</text>'
            f'<text x="{left + _WIDTH + 8}" y="{row + 15}">{share:.1%}</text>\n'
        )
        yield from _bars(coverage(starts, stops, edges), left, row, colour)
    yield "</svg>\n"


def _shorten(name: str) -> str:
    return name if len(name) <= _MOST_NAME else f"{name[: _MOST_NAME // 2]}...{name[-_MOST_NAME // 2 :]}"


def coverage(starts: Floats, stops: Floats, edges: Floats) -> Floats:
    """The share of each cell between two edges that lies in the union."""
    if not len(starts):
        return np.zeros(len(edges) - 1)
    lengths = np.cumsum(stops - starts)
    moments = np.stack([starts, stops], axis=1).ravel()
    busy = np.stack([np.append(0.0, lengths[:-1]), lengths], axis=1).ravel()  # busy seconds before each moment
    share: Floats = np.diff(np.interp(edges, moments, busy)) / np.maximum(np.diff(edges), 1e-12)
    return share


def _bars(coverage: Floats, left: int, top: int, colour: str) -> Iterator[str]:
    """A path for each shade, with a bar for each run of cells; narrow spans are one."""
    width = _WIDTH / len(coverage)
    shades = np.ceil(np.round(coverage, 6) * _SHADES).astype(int)
    borders = [0, *(np.flatnonzero(np.diff(shades)) + 1).tolist(), len(shades)]
    for shade in range(1, _SHADES + 1):
        bars = "".join(
            f"M{left + first * width:.6g} {top + 2}h{(last - first) * width:.6g}v{_ROW - 4}h-{(last - first) * width:.6g}z"
            for first, last in pairwise(borders)
            if shades[first] == shade
        )
        if bars:
            yield f'<path fill="{colour}" fill-opacity="{shade / _SHADES}" d="{bars}"/>\n'


def _axis(seconds: float, left: int, top: int, bottom: int) -> Iterator[str]:
    """Lines across all rows at round times, and their labels."""
    unit, name = next(
        (size, name)
        for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
        if seconds >= 2 * size or name == "s"
    )
    length = max(seconds, 1e-6) / unit
    power = 10.0 ** np.floor(np.log10(length / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 10 >= length)
    for number in range(int(length / step + 1e-9) + 1):
        x = left + number * step / length * _WIDTH
        yield (
            f'<path stroke="#ccc" d="M{x:.1f} {top - 4}V{bottom + 4}"/>'
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{number * step:g} {name}</text>\n'
        )
