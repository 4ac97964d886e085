"""A certificate as a page that stands alone: one HTML file without scripts or links, to be read, printed or attached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from oocattn.text import printable
from oocattn.verification.certificate import Certificate
from oocattn.verification.findings import RowCheck
from oocattn.verification.text import checksum_lines, dataset_line, error_line, ledger_line

WORST = 10
"""Rows that are shown one by one: the worst."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .15em .8em .15em 0; text-align: right; }
th { font-weight: 600; border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
.facts td, .facts th { text-align: left; vertical-align: top; border: 0; } .facts th { font-weight: 400; color: #666; }
.verdict { padding: .6em .9em; font-weight: 600; } .right { background: #e3f2e1; } .wrong { background: #f9dcdc; }
.open { background: #fdf3d0; }
td, code { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
"""


def certificate_page(certificate: Certificate) -> str:
    """The page as HTML."""
    title = f"Certificate of {certificate.result}"
    colour = "right" if certificate.passed else "open" if certificate.inconclusive else "wrong"
    bits = _section("Bits", *map(_paragraph, checksum_lines(certificate)), _paragraph(_CHECKSUMS))
    sections = [
        f'<h1>{_shown(title)}</h1>\n<p class="verdict {colour}">{_shown(certificate.verdict)}</p>',
        f"<p>{_shown(_sentence(certificate.statement))}</p>",
        bits if certificate.damaged else "",  # what is wrong comes first
        _section("What was checked", _facts(_subject(certificate)), *map(_paragraph, _method(certificate))),
        _section(
            "Rows",
            _paragraph(_sentence(f"out has a {error_line(certificate)}")),
            _strata(certificate),
            _paragraph(_ULPS.format(dtype=certificate.problem.out_dtype)),
        ),
        _section(_title_of_rows(certificate), _rows(certificate)),
        "" if certificate.damaged else bits,
        _section("Ledger", _paragraph(_sentence(ledger_line(certificate)))),
        _section("Made with", _facts(_versions(certificate))),
        _section("To check it again", f"<pre>{_shown(certificate.again)}</pre>"),
    ]
    head = f'<meta charset="utf-8"><title>{_shown(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(filter(None, sections))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


_ULPS = (
    "Errors are the largest of the rows: that of out is relative (norm over the head dimension), and its share of what is "
    "allowed counts lse as well; an ulp is a unit in the last place of {dtype} at the right value, over all elements."
)

_CHECKSUMS = (
    "Checksums are CRC-32, made as the run wrote each part and recorded in the result; they cover every element of out and "
    "lse, whatever its storage has become. The digest is a SHA-256 over names, shapes, dtypes and all of them. They tell of "
    "damage and of mistaken copies, not of intent."
)


def _subject(certificate: Certificate) -> list[tuple[str, str]]:
    return [
        ("result", certificate.result),
        ("problem", f"{certificate.problem}, scale {certificate.problem.scale:.9g}"),
        ("dataset", f"{certificate.dataset}, {dataset_line(certificate)}"),
        ("fingerprint recorded", certificate.dataset_recorded),
        ("fingerprint found", certificate.dataset_found),
        ("digest of the result", certificate.digest or "not available: no checksums are recorded"),
        ("seed", str(certificate.seed)),
        ("made", certificate.made),
    ]


def _method(certificate: Certificate) -> list[str]:
    return [
        f"{len(certificate.rows):,} rows were recomputed in float64 by the formula of attention, with K and V streamed from "
        "the dataset and code that shares nothing with the run. A row exceeds its tolerance where out or lse is off by more "
        "than rounding to its dtype and float32 arithmetic explain; the limits follow from the row's own sums. A row "
        "shows nothing where that may be more than 1% of out, or 0.01 of lse: it is not called wrong, and not counted.",
        f"{certificate.drawn:,} of them were drawn uniformly, without replacement, from all rows; the others "
        "are the first and last token and both sides of borders between chunks, where mistakes are likely. The statement "
        'above counts the former only. It is the "rule of three" (Hanley and Lippman-Hand, JAMA 249:1743, 1983).',
    ]


def _strata(certificate: Certificate) -> str:
    counts, errors = ("rows", "wrong", "show nothing"), ("error", "of allowed", "largest ulp", "mean ulp", "lse error")
    rows = [
        (of.name, f"{of.rows:,}", f"{of.wrong:,}", f"{of.showing_nothing:,}", f"{of.error:.1e}", f"{of.of_allowed:.2f}",
         f"{of.ulps:.3g}", f"{of.mean_ulps:.3g}", f"{of.lse_error:.1e}", f"{of.lse_ulps:.3g}")
        for of in certificate.strata
    ]  # fmt: skip
    return _table(("stratum", *counts, *errors, "lse ulp"), rows)


def _worst(certificate: Certificate) -> Sequence[RowCheck]:
    """All wrong rows first."""
    return sorted(certificate.rows, key=lambda row: (row.passed, row.shows, -row.of_allowed))[:WORST]


def _title_of_rows(certificate: Certificate) -> str:
    return f"The worst {len(_worst(certificate))} rows" if len(certificate.rows) > 1 else "The row"


def _rows(certificate: Certificate) -> str:
    header = ("batch", "head", "token", "sampled for", "error", "allowed", "lse error", "allowed", "largest ulp", "")
    rows = [
        (str(row.batch), str(row.head), f"{row.token:,}", ", ".join(row.strata), f"{row.error:.1e}", f"{row.allowed:.1e}",
         f"{row.lse_error:.1e}", f"{row.allowed_lse:.1e}", f"{row.ulps:.3g}", _mark(row))
        for row in _worst(certificate)
    ]  # fmt: skip
    return _table(header, rows)


def _mark(row: RowCheck) -> str:
    if not row.passed:
        return "WRONG"
    return "" if row.shows else "shows nothing"


def _versions(certificate: Certificate) -> list[tuple[str, str]]:
    pairs = [("computed with", certificate.computed_with), ("verified with", certificate.verified_with)]
    return [(what, ", ".join(f"{name} {number}" for name, number in of.items()) or "unknown") for what, of in pairs]


def _shown(text: str) -> str:
    """A text as HTML. What hides in it, such as in the name of a file, is shown by its number."""
    return escape(printable(text))


def _section(title: str, *content: str) -> str:
    return "\n".join([f"<h2>{_shown(title)}</h2>", *content])


def _paragraph(text: str) -> str:
    return f"<p>{_shown(text)}</p>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><th>{_shown(name)}</th><td>{_shown(value)}</td></tr>" for name, value in facts)
    return f'<table class="facts">\n{rows}\n</table>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_shown(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>\n" + "\n".join([line("th", header), *(line("td", row) for row in rows)]) + "\n</table>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
