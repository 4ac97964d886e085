"""What a user may choose of a plan: names, limits and defaults. Nothing is imported here, so that `--help` is quick."""

from __future__ import annotations

DECOMPOSITIONS = ("auto", "cqs", "strips")
"""How chunk pairs are divided; "auto" leaves it to the plan."""

MAX_CHUNKS = 9507
"""The most chunks that a sequence is cut into."""

MAX_SUBPROBLEMS = 1 << 20
"""The most subproblems of a head group: `status` looks through them, and nobody waits for more."""

CHECKPOINT_SECONDS = 60.0
"""What a kill may cost, unless the user chooses."""
