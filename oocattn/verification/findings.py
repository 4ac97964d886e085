"""The findings of `verify`: rows, checksums, ledger and strata."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from oocattn.problem.arrays import ArrayName
from oocattn.records import ADDED, Count, Range
from oocattn.storage.results.rows import Damage
from oocattn.verification.sampling import StratumName

MOST_OPEN = 0.01
"""Of `out` (relative) and of lse (absolute: so much is a share of the sum of weights). A row of which more may be lost
shows nothing."""

Limit = Annotated[float, Range(0.0, math.inf)]  # what is not negative, and may be Inf


@dataclass(frozen=True)
class RowCheck:
    """One recomputed row: its batch, head and row of `out`, the strata it was sampled for, and its errors.

    `error` is that of `out` (norm over Dv), relative to `length`, which is the norm of the exact row or a little more;
    `lse_error` is that of lse (absolute). Their limits are Inf where float32 overflows. `ulps` and `mean_ulps` are the
    largest and the mean error of an element of `out` in units of the last place of its dtype, `lse_ulps` that of lse in
    those of float32. The errors of a row that cannot be read are NaN.
    """

    batch: Count
    head: Count
    token: Count
    strata: tuple[StratumName, ...]
    length: Annotated[float, Range(0.0, sys.float_info.max)]
    error: float
    allowed: Limit
    lse_error: float
    allowed_lse: Limit
    ulps: Limit
    mean_ulps: Limit
    lse_ulps: Limit

    @property
    def passed(self) -> bool:
        """Whether both errors are within what is allowed. NaN never is."""
        return self.error <= self.allowed and self.lse_error <= self.allowed_lse

    @property
    def shows(self) -> bool:
        """Whether float32 arithmetic may lose at most 1% of the row."""
        return self.allowed <= MOST_OPEN and self.allowed_lse <= MOST_OPEN

    @property
    def of_allowed(self) -> float:
        """The larger of both errors, as a share of what is allowed."""
        return largest([_share(self.error, self.allowed), _share(self.lse_error, self.allowed_lse)])


@dataclass(frozen=True)
class ArrayCheck:
    """The checksums of an array: compared or not, and the damaged parts."""

    name: str
    state: Literal["checked", "not checked", "not recorded"]
    parts: Count
    damaged: tuple[Damage, ...]


@dataclass(frozen=True)
class Ledger:
    """What the run counted; `other_bits` says what computed otherwise, or "".

    Counts are of query-key pairs, of NaN and Inf in inputs (in the arrays `not_finite_in`) and `out`, of elements that only
    the dtype made Inf or 0, and of rows that attend no key.
    """

    expected: Count
    counted: Count
    not_finite: Count
    out_not_finite: Count
    out_overflowed: Count
    out_underflowed: Count
    rows_without_keys: Count
    other_bits: str
    not_finite_in: Annotated[tuple[ArrayName, ...], ADDED] = ()


@dataclass(frozen=True)
class Stratum:
    """What was found in the rows of a stratum, or in all; errors are as in `RowCheck`."""

    name: str
    rows: int
    wrong: int
    showing_nothing: int
    error: float
    of_allowed: float
    ulps: float
    mean_ulps: float
    lse_error: float
    lse_ulps: float


def stratum_of(name: str, rows: Sequence[RowCheck]) -> Stratum:
    maxima = ("error", "of_allowed", "ulps", "lse_error", "lse_ulps")
    return Stratum(
        name,
        rows=len(rows),
        wrong=sum(not row.passed for row in rows),
        showing_nothing=sum(row.passed and not row.shows for row in rows),
        mean_ulps=sum(row.mean_ulps for row in rows) / len(rows),
        **{field: largest([getattr(row, field) for row in rows]) for field in maxima},
    )


def _share(error: float, allowed: float) -> float:
    """The error as a share of what is allowed, which may be nothing or anything."""
    if error == 0 or (math.isinf(allowed) and not math.isnan(error)):
        return 0.0
    return error / allowed if allowed else math.inf


def largest(values: Sequence[float]) -> float:
    """The largest value, NaN if there is one."""
    return math.nan if any(map(math.isnan, values)) else max(values)
