"""Charts of the page of a report: SVG that scales with the page, is read without a script, and says more on hover."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal

from markupsafe import Markup, escape

from oocattn.pipelines.watch.attempts import BusyRow
from oocattn.text import printable
from oocattn.units import format_bytes, format_count, format_seconds

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 170, 84, 14, 10, 24
SHADES = 5  # in which a timeline shows how busy a resource was
MOST_TICKS = 5  # of an axis

Unit = Literal["FLOP/s", "B/s", "B"]

_TIME_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """Round moments from 0 up to a duration, and their labels."""
    unit, name = next(((size, name) for size, name in _TIME_UNITS if seconds >= 2 * size), _TIME_UNITS[-1])
    step = _step(max(seconds, 1e-6) / unit, 10)
    count = int(seconds / unit / step + 1e-9)
    return [(number * step * unit, f"{number * step:g} {name}") for number in range(count + 1)]


def _step(most: float, base: int) -> float:
    """A round step of which a few make up the most: 1, 2 or 5 times a power of ten, or a power of two of the prefix."""
    if most <= 0:
        return 1.0
    if base == 1024:
        return float(2.0 ** max(0, math.ceil(math.log2(most / MOST_TICKS))))
    power = 10.0 ** math.floor(math.log10(most / MOST_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * MOST_TICKS >= most)


def format_amount(amount: float, unit: Unit) -> str:
    """A number with its prefix and unit."""
    return f"{format_count(amount)}{unit}" if unit == "FLOP/s" else f"{format_bytes(amount)}{unit[1:]}"


def chart(
    title: str,
    unit: Unit,
    width: float,
    series: Mapping[str, Sequence[float]],
    lines: Mapping[str, float] | None = None,
) -> Markup:
    """A chart of amounts in bins of `width` seconds, one line a series, and level lines by name."""
    lines = lines or {}
    bins = max(map(len, series.values()), default=0)
    most = max([*(max(values, default=0) for values in series.values()), *lines.values(), 0]) * 1.05 or 1.0
    seconds = bins * width or 1.0
    data = {"w": width, "u": unit, "s": {name: [float(f"{each:.3g}") for each in values] for name, values in series.items()}}
    inside = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-chart="{escape(json.dumps(data))}">'
        f"<title>{escape(title)}</title>"
    ]
    step = _step(most, 10 if unit == "FLOP/s" else 1024)
    for number in range(int(most / step + 1e-9) + 1):
        y = TOP + inside[1] * (1 - number * step / most)
        label = format_amount(number * step, unit) if number else "0"
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for moment, label in time_ticks(seconds):
        x = LEFT + inside[0] * moment / seconds
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text>')
        parts.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
    for name, values in series.items():
        parts.append(f'<path class="line {name.replace(" ", "-")}" d="{_steps(values, seconds / width, most, inside)}"/>')
    for level in lines.values():
        y = TOP + inside[1] * (1 - level / most)
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    return Markup("".join([*parts, "</svg>"]))


def _steps(values: Sequence[float], bins: float, most: float, inside: tuple[int, int]) -> str:
    """A path with a level for each bin; neighbours of one height are one."""
    found, place = [], 0
    for height, same in groupby(round(inside[1] * (1 - value / most), 1) for value in values):
        place += len(list(same))
        found.append(f"V{TOP + height:g}H{LEFT + inside[0] * place / bins:.1f}")
    return f"M{LEFT} {TOP + inside[1]}{''.join(found)}"


def busy_strip(row: BusyRow, width: float) -> Markup:
    """The cells of a row of a timeline as stripes: the busier, the darker."""
    percentages = row.percentages
    shades = [math.ceil(percent * SHADES / 99) for percent in percentages]
    paths = []
    for shade in range(1, SHADES + 1):
        stripes = "".join(_stripes(shades, shade))
        if stripes:
            paths.append(f'<path stroke-opacity="{shade / SHADES:g}" d="{stripes}"/>')
    name = escape(printable(f"{row.lane}, {row.resource}"))
    return Markup(
        f'<svg class="busy {row.resource.replace(" ", "-")}" viewBox="0 0 {max(1, len(percentages))} 1" role="img" '
        f'preserveAspectRatio="none" data-width="{width:g}" data-busy="{row.percent}" data-name="{name}">'
        f"<title>{name}: busy {format_seconds(row.seconds)}</title>{''.join(paths)}</svg>"
    )


def _stripes(shades: Sequence[int], shade: int) -> Iterator[str]:
    place = 0
    for each, same in groupby(shades):
        count = len(list(same))
        if each == shade:
            yield f"M{place} .5h{count}"
        place += count


def gauge(used: float, planned: float, budget: float) -> Markup:
    """A bar of what was used of a budget, with a line at the plan's bound."""
    most = max(used, planned, budget, 1)
    return Markup(
        f'<svg class="gauge" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"><title>'
        f"{escape(format_bytes(used))} of {escape(format_bytes(budget))}</title>"
        f'<rect class="budget" width="{100 * budget / most:.2f}" height="10"/>'
        f'<rect class="used" width="{100 * used / most:.2f}" height="10"/>'
        f'<path d="M{100 * planned / most:.2f} 0v10"/></svg>'
    )
