"""Options of a plan: names, limits and defaults, also of the tasks that are submitted; no imports, for a quick `--help`."""

from __future__ import annotations

DECOMPOSITIONS = ("auto", "cqs", "strips")  # ways to divide chunk pairs; "auto" leaves it to the plan
MAX_CHUNKS = 9507  # the most chunks that a sequence is cut into
MAX_SUBPROBLEMS = 1 << 20  # the most subproblems of a head group; `status` looks through them
TASK_PIECE = 16  # subproblems of a lane, with a chunk each, whose tasks are submitted to the scheduler together
TASK_WINDOW = 32  # subproblems of a lane that wait at the scheduler, to hide a round trip: fewer, and more are submitted
MOST_UNFINISHED = 4 * TASK_WINDOW  # tasks of a lane, of any layer, that may wait there before no more are submitted
CHECKPOINT_SECONDS = 60.0  # the most work that a kill may cost by default
