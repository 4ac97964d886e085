"""A certificate as lines for a terminal, and as one HTML file. Foreign text is escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oocattn.pages import render_page
from oocattn.problem.arrays import weights_dtype
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.text import printable
from oocattn.units import format_count
from oocattn.verification.noise import SUSPICIOUS

if TYPE_CHECKING:
    from oocattn.problem.problem import Problem
    from oocattn.storage.results.summary import PlanRecord
    from oocattn.verification.certificate import Certificate
    from oocattn.verification.findings import AllRows

MOST_SHOWN = 20
"""Wrong rows, and damaged parts, that are listed for reading; the JSON has all."""

WORST = 10  # rows that are shown one by one: the worst


def certificate_text(certificate: Certificate) -> str:
    """The certificate for a terminal."""
    lines = [f"result       {printable(certificate.result)}", f"problem      {printable(certificate.words)}"]
    lines += [*_wrong_rows(certificate), ""] if certificate.named_wrong else [""]
    lines += [f"{'rows':<12} {'':>5} {'wrong':>6} {'error':>9} {'of allowed':>11} {'largest ulp':>12} {'mean ulp':>9}"]
    lines += [
        f"{each.name:<12} {each.rows:>5,} {each.wrong:>6,} {each.error:>9.1e} {each.of_allowed:>11.2f} {each.ulps:>12.3g} "
        f"{each.mean_ulps:>9.3g}"
        for each in certificate.strata
    ]
    overall = certificate.strata[-1]
    lines += [
        "",
        f"out          {error_line(certificate)}; an ulp is a unit in the last place of {certificate.problem.out_dtype}",
        f"lse          within {overall.lse_error:.1e}, {overall.lse_ulps:.3g} ulp of float32",
        *([f"all rows     {printable(all_rows_line(certificate.all_rows))}"] if certificate.all_rows else []),
        f"shown        {certificate.statement}",
        *(f"checksums    {printable(line)}" for line in checksum_lines(certificate)),
        *([f"weights      {weights_line(certificate.problem, certificate.plan)}"] if certificate.plan else []),
        *([f"same bits    {certificate.plan}"] if certificate.plan else []),
        f"ledger       {ledger_line(certificate)}",
        f"dataset      {printable(certificate.dataset)}, {printable(dataset_line(certificate))}",
        f"seed         {certificate.seed}",
        certificate.verdict,
    ]
    return "\n".join(lines)


def _wrong_rows(certificate: Certificate) -> list[str]:
    lines = ["", f"{'batch':>5} {'head':>5} {'row':>12} {'error':>9} {'allowed':>9} {'lse error':>9} {'allowed':>9}"]
    lines += [
        f"{row.batch:>5} {row.head:>5} {row.token:>12,} {row.error:>9.1e} {row.allowed:>9.1e} {row.lse_error:>9.1e} "
        f"{row.allowed_lse:>9.1e}  WRONG"
        for row in certificate.named_wrong[:MOST_SHOWN]
    ]
    return lines + more_line(len(certificate.named_wrong))


def error_line(certificate: Certificate) -> str:
    """How far `out` is off."""
    of_sample = "" if certificate.all_rows is None else " of the sample"
    worst = f"{certificate.worst_error:.1e} in the worst row{of_sample}"
    return f"relative error {certificate.error:.1e} (root mean square over rows), {worst}"


def weights_line(problem: Problem, plan: PlanRecord) -> str:
    """Whether the run was precise, as rows are judged."""
    weights = weights_dtype(problem.dtype, plan.rounds_weights)
    if weights == "float32":
        return f"kernel {plan.kernel} rounds no softmax weights: precise"
    return f"kernel {plan.kernel} rounds softmax weights to {weights}, and rows may be off by as much"


def all_rows_line(found: AllRows) -> str:
    """What a second pass found, and what computed it."""
    recomputed = f" (the {found.recomputed:,} worst)" if found.undecided else ""
    differ = f"{_count(found.suspected, 'differs and was', 'differ and were')} recomputed{recomputed}, "
    differ += _count(found.wrong_rows, "is wrong", "are wrong")
    others = "another kernel and division than the run's" if found.other else "a kernel or division of the run's"
    of_others = " of the other rows" if found.suspected else ""
    return (
        f"{found.rows:,} compared in lse and {found.vectors} sums of out with random signs, by {others} "
        f"({found.computed_by}); {differ if found.suspected else 'none differs'}; the largest difference{of_others} is "
        f"{found.worst:.1f} standard deviations of rounding, of {SUSPICIOUS:.0f} that are allowed"
    )


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def checksum_lines(certificate: Certificate) -> list[str]:
    """What is known of the result's bits, array by array."""
    lines = []
    for array in certificate.arrays:
        if array.state == "not recorded":
            lines.append(f"{array.name}: none are recorded, so nothing is known of the rows that were not recomputed")
        elif array.state == "not checked":
            lines.append(f"{array.name}: {array.parts:,} parts, not compared, as was asked")
        elif array.damaged:
            lines.append(f"{array.name}: {len(array.damaged):,} of {array.parts:,} parts are NOT as they were written:")
            lines += [f"  {damage}" for damage in array.damaged[:MOST_SHOWN]] + more_line(len(array.damaged))
        else:
            lines.append(f"{array.name}: all {array.parts:,} parts are as they were written")
    return [*lines, f"digest {certificate.digest}"] if certificate.digest else lines


def ledger_line(certificate: Certificate) -> str:
    """What the run counted."""
    ledger = certificate.ledger
    if ledger is None:
        return "not available: the folder of the run is not beside the result"
    if ledger.counted != ledger.expected:
        return (
            f"{ledger.counted:,} pairs counted, {ledger.expected:,} expected: the report beside the result is NOT that of "
            "its run"
        )
    counted = f"{format_count(ledger.counted)}pairs counted by the run, exactly those expected"
    bits = f"; a part was computed with {printable(ledger.other_bits)}" if ledger.other_bits else ""
    narrowed = f", {ledger.out_overflowed:,} of them too large for its dtype" if ledger.out_overflowed else ""
    narrowed += f", and {ledger.out_underflowed:,} zeros too small for it" if ledger.out_underflowed else ""
    without = f"; {ledger.rows_without_keys:,} rows without a key" if ledger.rows_without_keys else ""
    arrays = f" ({' and '.join(ledger.not_finite_in)})" if ledger.not_finite_in else ""
    special = f"{ledger.not_finite:,} NaN or Inf in the inputs{arrays}, {ledger.out_not_finite:,} in out"
    return f"{counted}{without}; {special}{narrowed}{bits}"


def dataset_line(certificate: Certificate) -> str:
    """Whether the dataset is that of the run."""
    if certificate.dataset_unchanged:
        return f"unchanged, fingerprint {certificate.dataset_found}"
    changed = changed_arrays(certificate.dataset_recorded, certificate.dataset_found)
    return f"not known to be the one that the run read: place, size or times of {changed} are others"


def more_line(count: int) -> list[str]:
    """The line below a list that was cut."""
    return [f"  and {count - MOST_SHOWN:,} more"] if count > MOST_SHOWN else []


def certificate_page(certificate: Certificate) -> str:
    """Render the page as HTML, names escaped and hidden characters shown."""
    return render_page(
        "verification/page.html.jinja",
        certificate=certificate,
        worst=sorted(
            [*certificate.named_wrong[len(certificate.wrong) :], *certificate.rows],
            key=lambda row: (row.passed, row.shows, -row.of_allowed),
        )[:WORST],
        all_rows_line=all_rows_line(certificate.all_rows) if certificate.all_rows else "",
        checksum_lines=checksum_lines(certificate),
        dataset_line=dataset_line(certificate),
        error_line=error_line(certificate),
        ledger_line=ledger_line(certificate),
        weights_line=weights_line(certificate.problem, certificate.plan) if certificate.plan else "",
    )
