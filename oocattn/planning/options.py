"""Options of a plan: names, limits and defaults; no imports, for a quick `--help`."""

from __future__ import annotations

DECOMPOSITIONS = ("auto", "cqs", "strips")  # ways to divide chunk pairs; "auto" leaves it to the plan
MAX_CHUNKS = 9507  # the most chunks that a sequence is cut into
MAX_SUBPROBLEMS = 1 << 20  # the most subproblems of a head group; `status` looks through them
CHECKPOINT_SECONDS = 60.0  # the most work that a kill may cost by default
