"""The page of a full report: tables in words and figures, charts, and everything escaped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from oocattn.pages import name_versions, render_page
from oocattn.pipelines.watch.attempts import MOST_NAMES, Attempt, OverTime, Planned
from oocattn.pipelines.watch.full_report import FullReport, LinkOutcome
from oocattn.pipelines.watch.report_charts import busy_strip, chart, gauge, time_ticks
from oocattn.units import format_bytes, format_count, format_seconds

MOST_LINES = 100  # of the log
MOST_ROWS = 240  # of all timelines together: those of the last attempts are drawn

_LINKS = {
    "read": "read from the inputs",
    "copy": "copied to and from the device",
    "compute": "computed",
    "partials": "saved as partials",
    "merge": "merged",
    "write": "written to the result",
}
_STYLES = {"finished": "passed", "running": "running", "interrupted": "inconclusive"}


def report_page(report: FullReport) -> str:
    """Render the page of a report as HTML."""
    status = report.status
    style = "failed" if status.certificate == "failed" else "inconclusive" if status.stalled else _STYLES[status.state]
    return render_page(
        "pipelines/watch/report.html.jinja",
        report=report,
        style=style,
        figures=_figures(report),
        links=[_link_row(link) for link in report.links],
        total=(_seconds(report.plan.seconds if report.plan else None), _seconds(report.seconds)),
        memory=list(_memory_rows(report)),
        attempts=[_attempt_row(number, each) for number, each in report.numbered()],
        details=_details(report),
        log=_log(report)[-MOST_LINES:],
        finished=str(status.report).splitlines() if status.report else [],
        plan=report.plan.plan.splitlines() if report.plan else [],
        made_with=_made_with(report),
    )


def _figures(report: FullReport) -> list[tuple[str, str, str]]:
    """The figures that matter most: a value, what it is, and what to compare it with."""
    plan, status, attempts = report.plan, report.status, report.attempts
    found = [("time", format_seconds(report.seconds), f"predicted {format_seconds(plan.seconds)}" if plan else "")]
    if status.state != "finished":
        found.append(("done", f"{status.share:.1%}", f"of {status.subproblems:,} subproblems"))
    if plan and report.seconds and attempts:
        share = sum(each.pairs for each in attempts) / max(1, plan.pairs)
        rate = share * plan.flops / report.seconds
        ceiling = plan.kernel_flops * plan.lanes
        of_kernel = f"{rate / ceiling:.0%} of the kernel's rate" if ceiling else ""
        found.append(("computed", f"{format_count(rate)}FLOP/s", of_kernel))
    elif status.rate:
        found.append(("rate", f"{format_count(status.rate)}tokens/s", ""))
    if attempts:
        lane_seconds = sum(each.seconds * max(1, each.lanes) for each in attempts)
        busy = sum(each.busy.get("compute", 0.0) for each in attempts) / lane_seconds if lane_seconds else 0.0
        found.append(("compute busy", f"{busy:.1%}", "of the time"))
        peak = max(each.peak_host for each in attempts)
        found.append(("host memory", format_bytes(peak), f"budget {format_bytes(plan.host_memory)}" if plan else ""))
        found.append(("attempts", f"{len(attempts) + report.left_out:,}", _faults_in_all(report)))
    if status.state == "finished":
        found.append(("certificate", status.certificate or "none", "" if status.certificate else "not verified yet"))
    return found


def _faults_in_all(report: FullReport) -> str:
    faults = sum(sum(each.faults.values()) for each in report.attempts)
    return f"{faults:,} fault{'s' * (faults != 1)}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _link_row(link: LinkOutcome) -> dict[str, Any]:
    def amount(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{format_count(value)}FLOP" if link.name == "compute" else format_bytes(value)

    return {
        "name": _LINKS[link.name],
        "predicted": amount(link.predicted),
        "amount": amount(link.amount),
        "predicted_seconds": _seconds(link.predicted_seconds),
        "seconds": _seconds(link.seconds),
        "ratio": f"{link.seconds / link.predicted_seconds:.2f}" if link.seconds and link.predicted_seconds else "-",
    }


def _memory_rows(report: FullReport) -> Iterator[dict[str, Any]]:
    plan, attempts = report.plan, report.attempts
    if plan is None:
        return
    for name, kind, planned, budget in (
        ("host", "peak_host", plan.peak_host, plan.host_memory),
        ("device", "peak_device", plan.peak_device, plan.device_memory),
    ):
        used = max((getattr(each, kind) for each in attempts), default=0)
        if budget:
            yield {
                "name": name,
                "used": format_bytes(used) if used else "-",
                "planned": format_bytes(planned),
                "budget": format_bytes(budget),
                "gauge": gauge(used, planned, budget),
                "above": kind == "peak_host" and used > planned,
            }


def _attempt_row(number: int, attempt: Attempt) -> dict[str, Any]:
    known = " at least" if attempt.end in ("", "killed") else ""
    return {
        "number": number,
        "started": _moment(attempt.started),
        "seconds": f"{format_seconds(attempt.seconds)}{known}",
        "end": attempt.state,
        "before": f"{attempt.subproblems_before:,}",
        "subproblems": f"{attempt.subproblems:,}",
        "read": format_bytes(attempt.bytes_read),
        "saved": format_bytes(attempt.bytes_saved),
        "written": format_bytes(attempt.bytes_written),
        "host": format_bytes(attempt.peak_host) if attempt.peak_host else "-",
        "faults": f"{sum(attempt.faults.values()):,}",
    }


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "unknown"


def _details(report: FullReport) -> list[dict[str, Any]]:
    """Timeline and charts of the attempts that have any; of very many rows the last ones are drawn."""
    rows, found = 0, []
    for number, attempt in reversed(report.numbered()):
        over_time = attempt.over_time
        if over_time is None or not any(over_time.rates.values()):
            continue
        rows += len(over_time.busy)
        seconds = over_time.width * max(map(len, over_time.rates.values()))
        found.append(
            {
                "number": number,
                "end": attempt.state,
                "seconds": format_seconds(attempt.seconds),
                "process": attempt.process,
                "ticks": [(100 * moment / seconds, label) for moment, label in time_ticks(seconds)],
                "rows": _timeline(over_time, attempt.seconds) if rows <= MOST_ROWS else [],
                "charts": list(_charts(over_time, report.plan)),
            }
        )
    return found[::-1]


def _timeline(over_time: OverTime, seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "lane": row.lane if row.lane.startswith("mean ") else f"lane {row.lane}",
            "resource": row.resource,
            "strip": busy_strip(row, over_time.width),
            "share": f"{min(1.0, row.seconds / seconds):.1%}" if seconds else "-",
        }
        for row in over_time.busy
    ]


def _charts(over_time: OverTime, plan: Planned | None) -> Iterator[tuple[str, list[str], list[str], Markup]]:
    """The charts of an attempt: a title, the names of its lines and of its levels, and the drawing."""
    width, rates = over_time.width, over_time.rates
    if plan and plan.pairs and any(rates.get("pairs", ())):
        computed = {"computed": [rate * plan.flops / plan.pairs for rate in rates["pairs"]]}
        level = {"the kernel's rate": plan.kernel_flops * plan.lanes} if plan.kernel_flops else {}
        yield "computed", [*computed], [*level], chart("computed over time", "FLOP/s", width, computed, level)
    moved = {
        name.replace("_", " "): rates[name]
        for name in ("read", "copied_in", "copied_out", "written", "saved")
        if any(rates.get(name, ()))
    }
    if moved:
        yield "bytes", [*moved], [], chart("bytes over time", "B/s", width, moved)
    for name, values, bound in (
        ("host", over_time.host, plan.peak_host if plan else 0),
        ("device", over_time.device, plan.peak_device if plan else 0),
    ):
        if any(values):
            level = {"bound of the plan": float(bound)} if bound else {}
            yield f"{name} memory", [name], [*level], chart(f"{name} memory over time", "B", width, {name: values}, level)


def _log(report: FullReport) -> list[tuple[str, int, str]]:
    lines = [(line.moment, number, line.words) for number, each in report.numbered() for line in each.log]
    lines += [
        (each.seen, number, f"{each.state}{f': {each.words}' if each.words else ''}")
        for number, each in report.numbered()
        if each.end not in ("", "finished") or each.words
    ]
    return [(_moment(moment), number, words) for moment, number, words in sorted(lines)]


def _made_with(report: FullReport) -> list[tuple[str, str]]:
    """Versions and hardware, those of the last attempt; where attempts differ, all of them."""
    found: dict[str, list[str]] = {}
    for each in report.attempts:
        for name, value in [("process", each.process), *each.hardware.items(), ("versions", name_versions(each.versions))]:
            if name not in found and len(found) >= MOST_NAMES:
                continue
            values = found.setdefault(name, [])
            if value not in values and len(values) < 8:
                values.append(value)
    if not found:
        found["versions"] = [name_versions(report.versions)]
    return [(name, "; then ".join(values)) for name, values in found.items()]
