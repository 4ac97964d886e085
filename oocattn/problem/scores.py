"""The terms of a score, between q . k and the softmax: today a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from oocattn.errors import ProblemError
from oocattn.records import Range

LEAST_SCALE, MOST_SCALE = 2.0**-126, (2 - 2**-23) * 2.0**127
"""The positive numbers of float32, in which scores are computed."""

SCALES = "a positive finite number that float32 holds (for a negative one, negate q)"  # these numbers in words

Scale = Annotated[float, Range(LEAST_SCALE, MOST_SCALE)]  # the factor of the scores


@dataclass(frozen=True)
class Scores:
    """The terms of a score: scale * q . k. Kernels get all of them in one record."""

    scale: float

    def check(self) -> None:
        """Raise ProblemError for a term that kernels cannot compute with."""
        if not LEAST_SCALE <= self.scale <= MOST_SCALE:
            raise ProblemError(f"scale = {self.scale} (float): expected {SCALES}")
