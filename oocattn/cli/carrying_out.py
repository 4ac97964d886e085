"""How a run is carried out from the command line: its options, and what they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from oocattn import clock
from oocattn.cli.readers import duration, size
from oocattn.kernels.registry import SecondPasses, kernel_names
from oocattn.pipelines.engines import DASHBOARD, ENGINES
from oocattn.pipelines.watch.events import Callback, Ended, Event, Started
from oocattn.units import format_seconds

if TYPE_CHECKING:
    from distributed import Client

    from oocattn.pipelines.watch.report import RunReport


def add_pass(parser: argparse._ActionsContainer, second_passes: SecondPasses) -> None:
    """Add what computes a second pass."""
    add, kernels = parser.add_argument, kernel_names(second_passes)
    add("--kernel", choices=kernels, help="kernel of the pass (default: of a Hopper GPU, if it serves there)")
    add("--device-memory", type=size, metavar="SIZE", help="hard limit on a GPU's memory (default: half of it)")


def add_watching(parser: argparse._ActionsContainer) -> None:
    """Add what says how a run is watched, for how long it may take, and what carries it out."""
    add = parser.add_argument
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar and the dashboard address (default: only if standard error is a terminal)",
    )
    add(
        "--timeline",
        metavar="FILE.json",
        help="record which resource was busy when: FILE.json for https://ui.perfetto.dev, and a picture, FILE.svg",
    )
    add(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="end before this time has passed since the start of the command, with all work saved and exit code 75",
    )
    add_engine(parser)
    cluster = parser.add_mutually_exclusive_group()
    cluster.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="Dask scheduler to run on, tried for 30 s (default: workers in this process)",
    )
    cluster.add_argument(
        "--dashboard",
        metavar="HOST:PORT",
        default=DASHBOARD,
        help="address of the dashboard; port 0 is any free port (default: %(default)s)",
    )


def add_engine(parser: argparse._ActionsContainer) -> None:
    """Add what runs the tasks."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="dask",
        help="what runs the tasks: Dask, or threads of this process alone (default: %(default)s)",
    )


@contextmanager
def carrying_out(options: argparse.Namespace, *listeners: Callback) -> Iterator[dict[str, Any]]:
    """The arguments of `oocattn.attention` that these options ask for, while inside, with further listeners."""
    from oocattn.cli.watching import log_on_standard_error

    unseen = options.progress is None and not sys.stderr.isatty()
    with log_on_standard_error() if unseen else nullcontext(), _client(options) as client:
        yield {
            "time_limit": _time_left(options.time_limit),
            "engine": options.engine,
            "client": client,
            "dashboard_address": options.dashboard,
            "callbacks": [*listeners, *_listeners(options)],
        }


def _time_left(limit: float | None) -> float | None:
    """What is left of a time limit that began with this process."""
    return None if limit is None else max(0.0, limit - clock.process_age())


def _listeners(options: argparse.Namespace) -> list[Callback]:
    """Those that a command line asks for."""
    listeners: list[Callback] = []
    if sys.stderr.isatty() if options.progress is None else options.progress:
        from oocattn.pipelines.watch.progress import ProgressBar

        listeners.append(ProgressBar())
    if options.timeline:
        from oocattn.pipelines.watch.timeline import Timeline

        listeners.append(Timeline(options.timeline))
    return listeners


def _client(options: argparse.Namespace) -> AbstractContextManager[Client | None]:
    """Of the scheduler at the address that is given, which must answer within the time limit; None where none is given."""
    if options.scheduler is None:
        return nullcontext(None)
    from oocattn.pipelines.engines.dask.connecting import CONNECT_SECONDS, connect

    left = _time_left(options.time_limit)
    return connect(options.scheduler, CONNECT_SECONDS if left is None else min(CONNECT_SECONDS, left))


class PlanPrinter:
    """A listener that prints the plan before the run's first task, unless it is `silent`."""

    def __init__(self, silent: bool) -> None:
        self.started, self._silent = False, silent

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = True
            if self._silent:
                return
            plan, left = event.plan, event.left
            print(plan, end="\n\n", flush=True)
            if event.resumed:
                print(f"resumed      {left:,} of {plan.subproblems:,} subproblems are left", end="\n\n", flush=True)


class PassTimer:
    """A listener that knows what a command with a second pass took, once that has ended."""

    def __init__(self) -> None:
        self._began, self._ended = clock.now(), 0.0
        self._report: RunReport | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._ended, self._report = clock.now(), event.report

    def __str__(self) -> str:
        from oocattn.pipelines.watch.report import time_with_pass  # which the pass has imported by then

        now = clock.now()
        words = time_with_pass(now - self._began, self._report)
        return words if self._report is None else f"{words} and what came after it {format_seconds(now - self._ended)}"
