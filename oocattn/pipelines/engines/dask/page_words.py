"""What the page of a run says in words, as HTML: headline, memory, log. Every text from outside is escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from oocattn.pipelines.watch.board import describe_times
from oocattn.units import format_bytes, format_seconds

OVER = ("finished", "failed")  # states after which nothing more comes
SILENT_SECONDS = 6.0  # without a record, after which the page says so

COLOURS = {"done": "#2a6fb0", "in flight": "#f28e2b", "left": "#cbd5e1", "masked": "#f6f6f4"}
"""Colours of chunk pairs."""

_STATES = {"running": "#2a6fb0", "finished": "#2e7d32", "failed": "#b3261e", "stalled": "#b26a00", "starting": "#555555"}
_RED = "#b3261e"

Record = Mapping[str, Any]


def headline(record: Record, age: float, others: Sequence[str] = ()) -> str:
    """Problem, result, state, share, elapsed, time left; that data stopped coming, where it did."""
    state = str(record["state"])
    bar = ""
    lines = [f"<b>{escape(record.get('problem', 'the run is being prepared'))}</b>", escape(f"to {record['result']}")]
    if "share" in record:
        done, total, share = record["subproblems_done"], record["subproblems"], 100 * record["share"]
        bar = (
            '<div style="background:#e4e8ee;height:10px;border-radius:5px;margin:6px 0;overflow:hidden">'
            f'<div style="background:{_STATES[state]};height:10px;width:{share:.2f}%"></div></div>'
        )
        begun = (
            f", and {record['pairs_in_flight'] / record['pairs']:.1%} of all in flight" if record["pairs_in_flight"] else ""
        )
        lines.append(f"{done:,} of {total:,} subproblems{begun}; {escape(describe_times(record))}")
    if record["words"]:
        lines.append(f'<span style="color:{_RED}">{escape(record["words"])}</span>')
    if age > SILENT_SECONDS and state not in OVER:
        lines.append(
            f'<b style="color:{_RED}">no data for {format_seconds(age)}: {escape(record["process"])} is stopped, gone or '
            "cut off</b>"
        )
    if others:
        links = ", ".join(f'<a href="?run={name}">{name}</a>' for name in others)
        lines.append(f"other runs of this scheduler: {links}")
    said = f'<span style="font-size:22px;color:{_STATES[state]}">{escape(_state(record))}</span>'
    return f'<div style="font-size:14px;line-height:1.5">{said}{bar}{"<br>".join(lines)}</div>'


def _state(record: Record) -> str:
    """State, share, elapsed and time left in one line."""
    state = str(record["state"])
    if "share" not in record:
        return state
    elapsed, share = format_seconds(record["seconds"]), f"{record['share']:.1%}"
    if state == "finished":
        return f"finished in {elapsed}"
    if state == "failed":
        return f"failed after {elapsed}, {share} done"
    return f"{state}: {share}, {elapsed} elapsed, about {format_seconds(record['seconds_left'])} left"


def legend(record: Record) -> str:
    """Colours of the matrix, and how many chunk pairs of each kind there are."""
    counts = pair_counts(record["matrix"])
    items = [
        f'<span style="display:inline-block;width:12px;height:12px;background:{COLOURS[kind]};border:1px solid #999">'
        f"</span> {kind} {count:,}"
        for kind, count in counts.items()
    ]
    return f'<div style="font-size:13px">{" &nbsp; ".join(items)}</div>'


def pair_counts(matrix: Record) -> dict[str, int]:
    """Chunk pairs of the matrix that are done, in flight, left and masked."""
    live, done, flying = (sum(map(sum, matrix[name])) for name in ("live", "done", "in_flight"))
    return {
        "done": done,
        "in flight": flying,
        "left": live - done - flying,
        "masked": matrix["query_chunks"] * matrix["key_chunks"] - live,
    }


def resources(record: Record) -> str:
    """Memory against budget and plan, scratch against plan, and the age of the last checkpoint."""
    memory, scratch = record["memory"], record["scratch"]
    besides = "; with what its processes do besides, such as this page" if memory["host"] > memory["host_peak"] else ""
    bars = [_bar("host memory", memory["host"], memory["host_peak"], memory["host_budget"], besides)]
    if memory["device_budget"]:
        bars.append(_bar("device memory", memory["device"], memory["device_peak"], memory["device_budget"]))
    bars.append(_bar("scratch on disk", scratch["bytes"], scratch["most"], 0))
    return f'<div style="font-size:13px;width:100%">{"".join(bars)}<div>{escape(_saved(record))}</div></div>'


def _bar(name: str, used: float, peak: float, budget: float, remark: str = "") -> str:
    """A bar of what is used, with a line at the plan's peak; its end is the budget, or the most that is planned."""
    most = max(used, peak, budget, 1)
    words = f"{name}: {format_bytes(used)}, planned peak {format_bytes(peak)}"
    words += (f", budget {format_bytes(budget)}" if budget else "") + remark
    colour = _RED if budget and used > budget else COLOURS["done"]
    return (
        f'<div>{words}</div><div style="position:relative;background:#e4e8ee;height:14px;margin:2px 0 10px">'
        f'<div style="background:{colour};height:14px;width:{100 * used / most:.2f}%"></div>'
        f'<div style="position:absolute;top:-2px;height:18px;border-left:2px solid #111;left:{99.7 * peak / most:.2f}%">'
        "</div></div>"
    )


def _saved(record: Record) -> str:
    """When something was last brought to disk for good."""
    interval = record["checkpoint_seconds"]
    words = f" (a kill costs at most {format_seconds(interval)} of work)" if interval else ""
    if not record["saved"]:
        return f"nothing saved yet{words}"
    if record["state"] == "finished":
        return "everything is saved"
    return f"last saved {format_seconds(max(0.0, record['moment'] - record['saved']))} ago{words}"


def log(record: Record) -> str:
    """The log, the newest line first."""
    lines = [
        f'<tr><td style="color:#666;padding-right:12px;white-space:nowrap">{_clock(line["moment"])}</td>'
        f"<td>{escape(line['words'])}</td></tr>"
        for line in reversed(record["log"])
    ]
    body = "".join(lines) or "<tr><td>no faults</td></tr>"
    return f'<div style="max-height:220px;overflow-y:auto;font-size:13px"><table>{body}</table></div>'


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
