"""What a second pass shows of some rows of a result, and of all of them together."""

from __future__ import annotations

import numpy as np

from oocattn.problem.second_pass import VECTORS
from oocattn.verification.attended import Int64s
from oocattn.verification.findings import MOST_ESCAPING, error_found
from oocattn.verification.noise import SUSPICIOUS, Array64, Quantiles

FOUND_BYTES = 64 << 10  # of what is found in a block: quantiles, and as many rows as are recomputed
_MOST_NOISE = MOST_ESCAPING / error_found(1.0, VECTORS)


class Differences:
    """By how many standard deviations rows differ from a second pass. The `most` that differ most are kept.

    `worst` is the largest difference of rows that are not suspected; `noise` has the deviations of a number of the pass,
    relative to the norm of the row, as `Judge` counts it, `lse_noise` those of lse. `worst_rows` are counted over all heads,
    and `open` are rows in which large errors may escape.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._worst_sigmas = np.empty(0)
        self.worst_rows: Int64s = np.empty(0, np.int64)
        self.suspected, self.open, self.worst = 0, 0, 0.0
        self.noise, self.lse_noise = Quantiles(), Quantiles()

    def see_noise(self, noise: Array64, lse_noise: Array64) -> None:
        """Count the deviations of rows that could be compared: of `out`, relative, and of lse."""
        self.noise.add(noise)
        self.lse_noise.add(lse_noise)
        self.open += int(np.count_nonzero(noise > _MOST_NOISE))

    def see_rows(self, sigmas: Array64, first: int) -> None:
        """Take the differences of the rows from `first` on, none of them NaN."""
        suspected = sigmas > SUSPICIOUS
        self.worst = max(self.worst, float(np.max(np.where(suspected, 0.0, sigmas), initial=0.0)))
        rows = np.flatnonzero(suspected)
        self.suspected += len(rows)
        self._keep(sigmas[rows], first + rows)

    def add(self, other: Differences) -> None:
        """Take what another pass over other rows showed. The order in which they are taken makes no difference."""
        self.worst = max(self.worst, other.worst)
        self.suspected += other.suspected
        self.open += other.open
        self.noise.merge(other.noise)
        self.lse_noise.merge(other.lse_noise)
        self._keep(other._worst_sigmas, other.worst_rows)

    def _keep(self, sigmas: Array64, rows: Int64s) -> None:
        """Keep the worst; of those that differ equally, the first."""
        if len(rows):
            sigmas, rows = np.concatenate([self._worst_sigmas, sigmas]), np.concatenate([self.worst_rows, rows])
            kept = np.lexsort((rows, -sigmas))[: self._most]
            self._worst_sigmas, self.worst_rows = sigmas[kept], rows[kept]
