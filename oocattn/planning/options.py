"""Options of a plan: names, limits and defaults; no imports, for a quick `--help`."""

from __future__ import annotations

DECOMPOSITIONS = ("auto", "cqs", "strips")
"""Ways to divide chunk pairs; "auto" leaves it to the plan."""

MAX_CHUNKS = 9507
"""The most chunks that a sequence is cut into."""

MAX_SUBPROBLEMS = 1 << 20
"""The most subproblems of a head group; `status` looks through them."""

CHECKPOINT_SECONDS = 60.0
"""The most work that a kill may cost by default."""
