"""What a bench hands back, and how it reads. Nothing is measured here."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from oocattn.pipelines.watch.report import RunReport
from oocattn.problem.arrays import DTYPES
from oocattn.problem.problem import Problem
from oocattn.records import document, to_json
from oocattn.units import format_bytes, format_count, format_seconds

FORMAT = 1
"""Of the JSON document."""

RESIDENT = "resident call"
"""The row that the others are compared with, where it could run."""

PAGE_CACHE = "oocattn, page cache"
"""The row whose plan and report are set against the ceilings."""

COLD_READ, WARM_READ, WRITE = "disk read, cold", "disk read, warm", "disk write, with fsync"
"""Ceilings of the disk."""


@dataclass(frozen=True)
class Progress:
    """One thing that was done, and its seconds."""

    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}: {format_seconds(self.seconds)}"


@dataclass(frozen=True)
class Ceiling:
    """The best `rate` of a part of this machine, in `unit`: FLOP/s or B/s."""

    name: str
    rate: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name:<48} {format_count(self.rate)}{self.unit}"


@dataclass(frozen=True)
class Row:
    """One way to compute the problem.

    `seconds` are those of every timed round, none where it could not run: `note` says why. `device_peak` is the most
    bytes that torch reserved on a GPU, None without one. `error` is that of the sampled rows of `out` against float64: the
    root mean square of each row's relative error, as causal rows differ in length. `report` is oocattn's last one.
    """

    name: str
    seconds: tuple[float, ...] = ()
    device_peak: int | None = None
    error: float | None = None
    note: str = ""
    report: RunReport | None = None

    @property
    def median(self) -> float:
        """Median seconds; infinite where it could not run."""
        return statistics.median(self.seconds) if self.seconds else float("inf")


@dataclass(frozen=True)
class Table:
    """The rows of one problem, and the ceilings that they are set against: the kernel's first."""

    problem: Problem
    rows: tuple[Row, ...]
    ceilings: tuple[Ceiling, ...]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def reference(self) -> Row:
        """The row that ratios are to: the resident call, or else the fastest."""
        resident = self.row(RESIDENT)
        return resident if resident.seconds else min(self.rows, key=lambda row: row.median)

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON document, with the medians, and the row that ratios are to (docs/scripts.md)."""
        rows = [{**to_json(row), "median": to_json(row.median)} for row in self.rows]
        return {**document(FORMAT, self), "rows": rows, "reference": self.reference.name}

    def __str__(self) -> str:
        reference = self.reference
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{self.problem}: seconds are medians, ratios are to the {reference.name}",
            "",
            f"{'':<{width}} {'seconds':>9} {'min to max':>17} {'ratio':>6} {'device peak':>11} {'error':>8}",
        ]
        lines += [self._line(row, reference, width) for row in self.rows]
        return "\n".join([*lines, *self._against_ceilings(self.row(PAGE_CACHE))])

    def _against_ceilings(self, row: Row) -> list[str]:
        """Lines that compare a row with its prediction, the kernel's ceiling, and reading and writing everything once."""
        report, problem = row.report, self.problem
        if report is None:
            return []
        rates = {ceiling.name: ceiling.rate for ceiling in self.ceilings}
        rate, kernel = problem.flops / row.median, self.ceilings[0].rate * report.lanes
        predicted, took = format_seconds(report.predicted_seconds), format_seconds(row.median)
        of_q, of_kv, written = bytes_once(problem)
        once = (of_q + of_kv) / rates[WARM_READ] + written / rates[WRITE]
        read = report.bytes_read
        return [
            "",
            f"{row.name}: predicted {predicted}, took {took}",
            f"{format_count(rate)}FLOP/s of attended pairs, {rate / kernel:.0%} of the kernel's ceiling on {report.lanes} "
            f"lane{'s' * (report.lanes > 1)}; compute was busy {report.compute_busy:.0%} of the time",
            f"{format_bytes(read)} read, {read / (of_q + of_kv):.2f} of what is attended of q, k and v; k and v at most "
            f"{(read - of_q) / max(1, of_kv):.2f} times",
            f"reading it once and writing out and lse take {format_seconds(once)} at the ceilings: it took "
            f"{row.median / once:.2f} of that",
        ]

    def _line(self, row: Row, reference: Row, width: int) -> str:
        if not row.seconds:
            return f"{row.name:<{width}}  {row.note}"
        spread = f"{min(row.seconds):.4g} to {max(row.seconds):.4g}"
        peak = "-" if row.device_peak is None else format_bytes(row.device_peak)
        error = "-" if row.error is None else f"{row.error:.1e}"
        ratio = row.median / reference.median
        return f"{row.name:<{width}} {row.median:>9.4g} {spread:>17} {ratio:>6.2f} {peak:>11} {error:>8}"


def bytes_once(problem: Problem) -> tuple[int, int, int]:
    """Bytes of what is attended of q, of k, v and key_bias, and of `out` and `lse`."""
    rows = range(*problem.rows_asked)
    keys = sum(len(live) for batch in range(problem.batch) for live in problem.mask(batch).live_keys(rows))
    of_q = problem.rows * problem.head_dim * problem.itemsize
    return (
        of_q,
        keys * problem.entry_groups * problem.kv_row_bytes,
        problem.rows * (problem.value_dim * DTYPES[problem.out_dtype] + 4),
    )
