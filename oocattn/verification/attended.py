"""The keys that rows attend: the mask, defined a second time on purpose.

Nothing of `problem.mask` is used here, so that a fault there shows. A new mask is a case in `attended_ranges`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from oocattn.problem.problem import Problem

Int64s = npt.NDArray[np.int64]


def attended_ranges(problem: Problem, tokens: Int64s) -> Int64s:
    """The ranges [first, last) of keys that the rows of `tokens` attend: int64 [rows, ranges, 2].

    Ranges of a row do not overlap. Rows that need fewer ranges have empty ones, with first = last.
    """
    last = tokens + 1 if problem.causal else np.full_like(tokens, problem.tokens)
    return np.stack([np.zeros_like(last), last], axis=-1)[:, np.newaxis]


class AttendedKeys:
    """The keys that some rows attend, given by ranges [rows, ranges, 2]."""

    def __init__(self, ranges: Int64s) -> None:
        self._ranges = ranges

    @property
    def span(self) -> range:
        """From the first to the last key that any row attends."""
        used = self._ranges[self._ranges[..., 0] < self._ranges[..., 1]]
        return range(int(used[:, 0].min()), int(used[:, 1].max())) if len(used) else range(0)

    def count(self, start: int, stop: int) -> Int64s:
        """The keys of [start, stop) that each row attends: [rows]."""
        clipped = self._ranges.clip(start, stop)
        counts: Int64s = (clipped[..., 1] - clipped[..., 0]).sum(axis=1)
        return counts

    def hidden(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Which keys of [start, stop) each row does not attend: [rows, n]; None where all rows attend all of them."""
        if (self.count(start, stop) == stop - start).all():
            return None
        keys = np.arange(start, stop)
        hidden = np.ones((len(self._ranges), len(keys)), bool)
        for first, last in self._ranges.transpose(1, 2, 0)[..., np.newaxis]:  # each [rows, 1]
            hidden &= (keys < first) | (keys >= last)
        return hidden
