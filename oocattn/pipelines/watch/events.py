"""Events of a run, one record a kind, and the listeners that are called with them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from traceback import extract_tb
from typing import TYPE_CHECKING, ClassVar, Literal

from oocattn import clock
from oocattn.log import logger
from oocattn.pipelines.schedule import NOTHING_COMPLETED, CompletedWork

if TYPE_CHECKING:
    from oocattn.pipelines.watch.report import RunReport
    from oocattn.planning.plan import Plan

Resource = Literal["read", "copy in", "compute", "copy out", "merge", "save", "write"]
"""Parts of a lane that `Span` times, in the order in which bytes pass through."""


@dataclass(frozen=True)
class Span:
    """A stretch of time (seconds since the epoch, on the lane's clock) in which a resource of a lane was busy.

    read: chunks into host memory. copy in, copy out: between host and device. compute: the kernel, and on a GPU the merging
    that follows each of its calls. merge, write: finished query chunks. save: checkpoints of unfinished ones.
    """

    resource: Resource
    start: float
    stop: float


def name_process() -> str:
    """This process, as events name it: host and number."""
    return f"{socket.gethostname()} {os.getpid()}"


@dataclass(frozen=True)
class Memory:
    """Bytes that lanes hold in a `process` (host and number).

    `host` is anonymous memory, pinned memory included, beyond what the process had when its lane was opened. `device` is
    what PyTorch has reserved on the lane's GPU.
    """

    process: str
    host: int
    device: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """One step of a run between two moments (epoch seconds); `kind` names its class."""

    start: float
    stop: float
    kind: ClassVar[str] = "event"

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__.lower()


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The run started: its plan, and the dashboard's address, "" where there is none.

    `left` subproblems with `pairs_left` query-key pairs are left to be computed; `resumed` says that some were done before,
    and `done` which; `recomputed` counts partials and records that were found damaged.
    """

    plan: Plan
    dashboard: str
    left: int
    resumed: bool
    recomputed: int
    done: CompletedWork = NOTHING_COMPLETED
    pairs_left: int = 0


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """A damaged partial (`recomputed`), a failed task or lost workers: the run continues with the `left` subproblems.

    These have `pairs_left`. `done` is what need not be done again.
    """

    error: str
    left: int = 0
    recomputed: int = 0
    retried: int = 0
    workers_lost: int = 0
    done: CompletedWork = NOTHING_COMPLETED
    pairs_left: int = 0


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """The state that lanes held in memory was saved as they stopped."""

    bytes: int


@dataclass(frozen=True, kw_only=True)
class Progressed(Event):
    """The lane of `worker` has attended `pairs` of its subproblems in flight so far: at most once a second."""

    worker: str
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Stalled(Event):
    """The run stalls for `reason`; "" when it continues."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Committed(Event):
    """The result has its final name, `path`."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run failed, or was told to stop (`stopped`).

    `done` is what is on disk then, as the next process will find it, and the `left` subproblems have `pairs_left`: tasks end
    while lanes stop, and not everything that was attended may have been saved. None where the disk does not say.
    """

    error: str
    stopped: bool = False
    left: int = 0
    done: CompletedWork | None = None
    pairs_left: int = 0


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The run ended with a committed result."""

    report: RunReport


@dataclass(frozen=True, kw_only=True)
class TaskEvent(Event):
    """A task of `worker` ended; `index` counts subproblems or query chunks within `head_group`.

    `copied_in` and `copied_out` are bytes that the lane copied to its GPU and from it since the event before; 0 on a CPU,
    which computes where chunks were read.
    """

    head_group: int
    index: int
    worker: str = ""
    spans: tuple[Span, ...] = ()
    copied_in: int = 0
    copied_out: int = 0

    @property
    def extent(self) -> tuple[float, float]:
        """When its work began and ended: the first and the last of its spans, or the task where it has none."""
        if not self.spans:
            return self.start, self.stop
        starts, stops = [span.start for span in self.spans], [span.stop for span in self.spans]
        return min(self.stop, *starts), max(self.start, *stops)


@dataclass(frozen=True, kw_only=True)
class Staged(TaskEvent):
    """The chunks of a subproblem were read into host memory.

    `not_finite` are the arrays in which NaN or Inf were found: of key_bias NaN or +Inf, for -Inf leaves a key out.
    """

    bytes: int
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attended(TaskEvent):
    """The partials of a subproblem were computed.

    `pairs` counts query-key pairs of all heads, `partial_bytes` what was written to files of partials, `out_of_memory` how
    often tiles were halved for want of device memory. `checkpoint_bytes` were saved by checkpoints since the event before,
    the last of which ended at `checkpointed` (seconds since the epoch; 0: there was none). `memory` is what the lane's
    process held then; None where that is unknown.
    """

    pairs: int
    partial_bytes: int = 0
    out_of_memory: int = 0
    checkpoint_bytes: int = 0
    checkpointed: float = 0.0
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True)
class Merged(TaskEvent):
    """A query chunk's partials were merged and divided; its rows attended `pairs`."""

    pairs: int


@dataclass(frozen=True, kw_only=True)
class Written(TaskEvent):
    """A query chunk was written to `out` and `lse`."""

    bytes: int


Callback = Callable[[Event], None]
"""A listener: called with every event of a run, in the order of completion.

The calls come from the thread that drives the run. One that raises an `Exception` is logged and called no more. It
ends the run by `KeyboardInterrupt` or `SystemExit`.
"""


class Listeners:
    """A listener that passes every event on to others, in their order, and drops one that raises an `Exception`."""

    def __init__(self, listeners: Iterable[Callback]) -> None:
        self._listeners = list(listeners)
        self._in: tuple[Callback, float] | None = None

    @property
    def kept_by(self) -> tuple[str, float] | None:
        """The listener that is at an event now, and since when (seconds since the epoch); None between events."""
        now_in = self._in
        return None if now_in is None else (_name(now_in[0]), now_in[1])

    def __call__(self, event: Event) -> None:
        try:
            self._pass_on(event)
        finally:
            self._in = None

    def _pass_on(self, event: Event) -> None:
        for listener in list(self._listeners):
            self._in = listener, clock.now()
            try:
                listener(event)
            except Exception as error:
                self._listeners = [other for other in self._listeners if other is not listener]
                frame = extract_tb(error.__traceback__)[-1]
                logger.warning(
                    "a listener failed; the run continues without it: %s raised %s: %s (%s, line %d)",
                    *(_name(listener), type(error).__name__, error, frame.filename, frame.lineno),
                )


def _name(listener: Callback) -> str:
    """What messages call a listener."""
    return str(getattr(listener, "__qualname__", type(listener).__qualname__))
