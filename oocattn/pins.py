"""What pins a result's bits besides its problem, as the arguments with which another run computes the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from oocattn.naming import settings
from oocattn.records import ADDED, Count, Excerpt, Pattern, Positive


@dataclass(frozen=True, kw_only=True)
class Pins(Excerpt):
    """Choices of a plan that decide bits; `device_memory` (bytes) does for the tiles of GPUs alone, and is None elsewhere.

    No argument pins `span`, the key chunks that a strip takes at a time (0 with cyclic quorums).
    """

    chunks: Positive
    decomposition: Literal["cqs", "strips"]
    kernel: Annotated[str, Pattern(r"[a-z0-9_-]{1,32}")]
    span: Count
    device_memory: Annotated[Positive | None, ADDED] = None

    def __str__(self) -> str:
        names = ("chunks", "decomposition", "kernel", *(["device_memory"] if self.device_memory else []))
        words = settings({name: getattr(self, name) for name in names})
        spans = f"{self.span} key chunk{'s' * (self.span > 1)}"
        return f"{words}, if the plan then takes {spans} at a time again" if self.span else words
