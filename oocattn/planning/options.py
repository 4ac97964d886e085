"""What a user may choose of a plan: names, limits and defaults. Little is imported here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass

DECOMPOSITIONS = ("auto", "cqs", "strips")
"""How chunk pairs are divided; "auto" leaves it to the plan."""

MAX_CHUNKS = 9507
"""The most chunks that a sequence is cut into."""

MAX_SUBPROBLEMS = 1 << 20
"""The most subproblems of a head group: `status` looks through them, and nobody waits for more."""

CHECKPOINT_SECONDS = 60.0
"""What a kill may cost, unless the user chooses."""


@dataclass(frozen=True)
class Choices:
    """What a user chose of a plan, None for what is left to it: budgets in bytes, what a kill may cost in seconds."""

    device_memory: int | None = None
    host_memory: int | None = None
    chunks: int | None = None
    decomposition: str = "auto"
    kernel: str | None = None
    checkpoint_seconds: float | None = None
