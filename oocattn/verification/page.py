"""A certificate as a page: one HTML file without scripts or links."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oocattn.text import printable
from oocattn.verification.certificate import Certificate
from oocattn.verification.text import checksum_lines, dataset_line, error_line, ledger_line

WORST = 10
"""Rows that are shown one by one: the worst."""


def certificate_page(certificate: Certificate) -> str:
    """Render the page as HTML, names escaped and hidden characters shown."""
    environment = Environment(
        loader=PackageLoader("oocattn", "verification"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters.update(sentence=_sentence, thousands="{:,}".format, versions=_versions)
    return environment.get_template("page.html.jinja").render(
        certificate=certificate,
        worst=sorted(certificate.rows, key=lambda row: (row.passed, row.shows, -row.of_allowed))[:WORST],
        checksum_lines=checksum_lines(certificate),
        dataset_line=dataset_line(certificate),
        error_line=error_line(certificate),
        ledger_line=ledger_line(certificate),
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or "unknown"
