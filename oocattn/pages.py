"""Pages that are kept: HTML files that need nothing else, from templates that share one style (`page.html.jinja`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from oocattn.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

HTML_MARK = "<!DOCTYPE html>\n<!-- written by oocattn, which may replace this file -->\n"
"""The beginning of a page."""


def render_page(template: str, **values: Any) -> str:
    """Render the template at a path in the package. Text is escaped, and hidden characters are shown."""
    return HTML_MARK + _environment().get_template(template).render(values)


def name_versions(versions: Mapping[str, str]) -> str:
    """Names with their versions, in a line."""
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or "unknown"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("oocattn", ""),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters.update(
        sentence=lambda text: f"{text[:1].upper()}{text[1:]}.",
        thousands="{:,}".format,
        versions=name_versions,
    )
    return environment
