"""The terms of a score, between q . k and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from oocattn.errors import ProblemError
from oocattn.naming import as_given
from oocattn.records import Range

LEAST_SCALE, MOST_SCALE = 2.0**-126, (2 - 2**-23) * 2.0**127
"""The positive numbers of float32, in which scores are computed."""

SCALES = "a positive finite number that float32 holds (for a negative one, negate q)"  # these numbers in words
SOFTCAPS = "a positive finite number that float32 holds, or None"

Scale = Annotated[float, Range(LEAST_SCALE, MOST_SCALE)]  # the factor of the scores, and the bound of a softcap


@dataclass(frozen=True)
class Scores:
    """The terms of a score that all heads share; kernels get them in one record.

    s = scale * q . k; then, with a softcap c, c tanh(s / c). After that, heads add -slope |p - j| where they have ALiBi
    slopes (p is the row's position, j the key's) and the key's bias.
    """

    scale: float
    softcap: float | None = None

    def check(self) -> None:
        """Raise ProblemError for a term that kernels cannot compute with."""
        if not LEAST_SCALE <= self.scale <= MOST_SCALE:
            raise ProblemError(f"{as_given('scale', self.scale)}: expected {SCALES}")
        if self.softcap is not None and not LEAST_SCALE <= self.softcap <= MOST_SCALE:
            raise ProblemError(f"{as_given('softcap', self.softcap)}: expected {SOFTCAPS}")
