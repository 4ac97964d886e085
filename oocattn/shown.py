"""How public records show themselves: one line as `repr`, and a small table in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable

from oocattn.text import printable

NAME_WIDTH = 12  # characters in which printed lines have their name

MOST_OF_A_LINE = 200  # characters of a `repr`


class Shown:
    """Base of records that people meet in a console or a notebook."""

    def _line(self) -> str:
        """The record in a few words."""
        raise NotImplementedError

    def _table(self) -> Iterable[tuple[str, str]]:
        """Names and values that are worth a look."""
        raise NotImplementedError

    def __repr__(self) -> str:
        line = printable(f"{type(self).__name__}: {self._line()}")
        return f"<{line if len(line) <= MOST_OF_A_LINE else f'{line[: MOST_OF_A_LINE - 3]}...'}>"

    def _repr_html_(self) -> str:
        """The record as a table for Jupyter; it sets no colours, so that it fits dark and light themes."""
        return html_table(type(self).__name__, self._table())


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A table of two columns as HTML that is well-formed XML too: text is escaped, values that are empty are left out."""
    left = 'style="text-align: left"'
    body = "".join(
        f"<tr><th {left}>{_escaped(name)}</th><td {left}>{_escaped(value)}</td></tr>" for name, value in rows if value
    )
    return f'<table><thead><tr><th {left} colspan="2">{_escaped(title)}</th></tr></thead><tbody>{body}</tbody></table>'


def named_lines(text: str) -> list[tuple[str, str]]:
    """Names and values of lines with a name in their first `NAME_WIDTH` characters; lines without go with the one above."""
    rows: list[tuple[str, str]] = []
    for line in filter(None, text.splitlines()):
        name, value = line[:NAME_WIDTH].strip(), " ".join(line[NAME_WIDTH:].split())
        if name or not rows:
            rows.append((name, value))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {value}")
    return rows


def _escaped(text: str) -> str:
    return html.escape(printable(text))
