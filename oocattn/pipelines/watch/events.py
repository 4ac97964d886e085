"""What happens in a run, as records: the one interface between a run and all that watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "started", "staged", "attended", "merged", "written", "saved", "stalled", "mended", "committed", "failed", "ended"
]

Resource = Literal["read", "copy in", "compute", "copy out", "merge", "save", "write"]
"""What a lane has one or more of, in the order in which bytes pass through: see `Span`."""


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a resource of a lane was busy.

    read: chunks into host memory. copy in, copy out: between host and device. compute: the kernel, and on a GPU the merging
    that follows each of its calls. merge, write: finished query chunks. save: checkpoints of unfinished ones. `start` and
    `stop` are seconds since the epoch, on the lane's clock; what happened on a GPU is timed there.
    """

    resource: Resource
    start: float
    stop: float


@dataclass(frozen=True)
class Event:
    """One step of a run.

    `kind` is what happened: the run started, a subproblem was staged or attended, a query chunk was merged or written, what
    lanes held in memory was saved as they stopped, the run stalled (`detail["reason"]` says why, and is "" when it goes on),
    something went wrong and was mended, so that the run goes on with what is left, the result was committed under its final
    name, the run failed, or it ended. `index` counts subproblems (staged,
    attended) or chunks (merged, written) within `head_group`; `start` and `stop` are seconds since the epoch on `worker`;
    `amount` is bytes (staged, written, saved) or query-key pairs (attended, merged); `detail` holds what only one kind has;
    `spans` says which resources of the lane were busy when.
    """

    kind: Kind
    start: float
    stop: float
    head_group: int = -1
    index: int = -1
    worker: str = ""
    amount: int = 0
    detail: Mapping[str, object] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()


Callback = Callable[[Event], None]
"""A listener: called with every event of a run, in the order of completion, on the thread that drives the run.

One that raises an `Exception` is logged and called no more. It ends the run by `KeyboardInterrupt` or `SystemExit`.
"""
