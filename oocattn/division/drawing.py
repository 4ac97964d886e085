"""The chunk-pair matrix of a division as a picture: a colour a subproblem."""

from __future__ import annotations

import colorsys
import textwrap

from oocattn.division.base import Division

MOST_CHUNKS = 133  # the chunk up to which larger matrices are drawn; browsers load no more cells

_SIDE = 720
_MARGIN = 60
_CELL = 7.5  # the width of a character at most, in a monospaced font of size 12


def draw_division(division: Division, mask: str) -> str:
    """The matrix as SVG: rows are query chunks, columns keys, colours subproblems."""
    live = division.live
    queries, keys = (min(chunks, MOST_CHUNKS) for chunks in (live.query_chunks, live.key_chunks))
    width, height = _SIDE / keys, _SIDE / queries
    cells = []
    for query in range(queries):
        for key in (key for key in live.keys(query) if key < keys):
            owner = division.owner(query, key)
            cells.append(
                f'<rect x="{_MARGIN + key * width:.2f}" y="{_MARGIN + query * height:.2f}" width="{width:.2f}" '
                f'height="{height:.2f}" fill="{_colour(owner)}"><title>query chunk {query}, key chunk {key}: '
                f"subproblem {owner}</title></rect>"
            )
    chunks = f"{live.query_chunks} chunks"
    if live.query_chunks != live.key_chunks:
        chunks = f"{live.query_chunks} query chunks, {live.key_chunks} key chunks"
    caption = f"{chunks}, {len(division.indices)} subproblems, {mask}: a colour is a subproblem"
    if queries < live.query_chunks or keys < live.key_chunks:
        caption += f" (the first {MOST_CHUNKS} chunks are shown)"
    lines = textwrap.wrap(caption, int((_SIDE + _MARGIN) / _CELL))
    size = _SIDE + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" font-family="monospace" font-size="12">'
        f'<rect width="{size}" height="{size}" fill="white"/>'
        + "".join(f'<text x="{_MARGIN}" y="{17 * number}">{line}</text>' for number, line in enumerate(lines, 1))
        + f'<text x="{size / 2}" y="53" text-anchor="middle">key chunk</text>'
        f'<text transform="translate(40 {size / 2}) rotate(-90)" text-anchor="middle">query chunk</text>'
        f"{''.join(cells)}"
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="black"/></svg>\n'
    )


def _colour(index: int) -> str:
    """A hue by the golden ratio: no two of a few hundred are alike."""
    hue = index * 0.6180339887 % 1.0
    lightness = (0.55, 0.7, 0.4)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.65)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"
