"""The findings of `verify`: rows, checksums, ledger and strata."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

from oocattn.problem.arrays import ArrayName
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Positive, Range
from oocattn.storage.results.rows import Damage
from oocattn.verification.noise import SUSPICIOUS
from oocattn.verification.sampling import StratumName

MOST_OPEN = 0.01
"""Of `out` (relative) and of lse (absolute: so much is a share of the sum of weights). A row of which more may be lost
shows nothing."""

CERTAIN = 0.999
"""The probability with which errors are found that a certificate says are found."""

MOST_ESCAPING = 0.1
"""Of a row of `out`: an error that a second pass must not let escape."""

MOST_VAGUE = 0.1  # the share of rows of which it may, above which nothing is concluded

Limit = Annotated[float, Range(0.0, math.inf)]  # what is not negative, and may be Inf


@dataclass(frozen=True)
class RowCheck:
    """One recomputed row: its batch, head and row of `out`, the strata it was sampled for, and its errors.

    `error` is that of `out` (norm over Dv), relative to `length`, the norm of the exact row or more (`compare_row`);
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


def error_found(noise: float, vectors: int) -> float:
    """The smallest error of a row that `vectors` sums find with a probability of 99.9%, in the unit of the noise of each.

    An error of norm e moves each number of the pass by a normal one of deviation e. Noise of its own is left out: it makes
    more of them large.
    """
    escapes = (1 - CERTAIN) ** (1 / vectors)  # of one vector alone
    return SUSPICIOUS * noise / NormalDist().inv_cdf((1 + escapes) / 2)


@dataclass(frozen=True)
class AllRows:
    """Every row, compared with a second pass over its pairs: `vectors` numbers of each, by sign vectors of `seed`, and lse.

    `suspected` rows differ from it by more than rounding explains; the worst were `recomputed`, as a `RowCheck` each, and
    `wrong_rows` of these are wrong; `wrong` has the worst of them. Of `open` rows so much noise is allowed that an error of
    a tenth may escape. `worst` is the largest difference of the rows that are not suspected, in standard deviations of the
    noise. `noise` is such a deviation relative to the norm of the row, as `Judge` counts it: half of the rows have less, and
    of 100 rows 99 have less than `most_noise`; `lse_noise` is that of lse, absolute. `computed_by` has the kernel and the
    division of the pass, and `other` is True if these are other than the run's.
    """

    rows: Positive
    vectors: Positive
    seed: Count
    suspected: Count
    recomputed: Count
    wrong_rows: Count
    wrong: tuple[RowCheck, ...]
    open: Count
    worst: Limit
    noise: Limit
    most_noise: Limit
    lse_noise: Limit
    computed_by: str
    other: bool

    @property
    def undecided(self) -> int:
        """Suspected rows that were not recomputed."""
        return self.suspected - self.recomputed

    @property
    def vague(self) -> bool:
        """Whether of more than a tenth of the rows an error of a tenth may escape."""
        return self.open > MOST_VAGUE * self.rows

    @property
    def inconclusive(self) -> bool:
        """Whether no row is wrong, but not all of them were decided, or errors may escape."""
        return not self.wrong_rows and (self.undecided > 0 or self.vague)

    def check(self, problem: Problem) -> None:
        """Raise ValueError where it is of no result of this problem, or its numbers contradict each other."""
        check_places(problem, self.wrong)
        counts = self.wrong_rows <= self.recomputed <= self.suspected <= self.rows == problem.rows
        kept = len(self.wrong) <= self.wrong_rows and bool(self.wrong) == (self.wrong_rows > 0)
        if not (counts and kept) or any(row.passed for row in self.wrong):
            raise ValueError("what it says of all rows contradicts itself")

    def found(self, noise: float) -> float:
        """The smallest error that is found with a probability of 99.9%, relative like `noise`."""
        return error_found(noise, self.vectors)

    @property
    def statement(self) -> str:
        """What is known of every row."""
        every = f"every one of {self.rows:,} rows was compared with a second pass over its pairs"
        if self.wrong_rows:
            wrong = f"{self.wrong_rows:,} of {self.recomputed:,} that were recomputed"
            return f"{every}, from which {self.suspected:,} differ: {wrong} {'is' if self.wrong_rows == 1 else 'are'} wrong"
        if self.undecided:
            return f"{every}: {self.suspected:,} differ from it, of which {self.recomputed:,} were recomputed and are right"
        right = f" ({self.suspected:,} differed, and are right in float64)" if self.suspected else ""
        lse = (SUSPICIOUS + NormalDist().inv_cdf(CERTAIN)) * self.lse_noise
        open_rows = f"; of {self.open:,} rows arithmetic may lose so much that errors of 10% escape" if self.open else ""
        half, most = (f"{100 * self.found(noise):.2g}%" for noise in (self.noise, self.most_noise))
        return (
            f"{every}, and none is known to be wrong{right}. An error of {half} of a row of out, spread over its elements, "
            f"is found with a probability of {CERTAIN:.1%} in half of the rows, one of {most} in 99 of 100 rows, and one of "
            f"{lse:.1g} in lse{open_rows}"
        )


def check_places(problem: Problem, rows: Sequence[RowCheck]) -> None:
    """Raise ValueError for rows that no result of the problem has."""
    sizes = problem.out_shape[:3]
    for row in rows:
        if any(place >= size for place, size in zip((row.batch, row.head, row.token), sizes, strict=True)):
            raise ValueError(f"batch {row.batch}, head {row.head}, token {row.token} is no row of its problem")


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
