"""How well plans predicted the runs of this user on this machine: the last of them, in a small file of the user's state.

Nothing depends on it: plans are not corrected by it. What is damaged is as if it was not there, and where it cannot be
written nothing is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from oocattn.errors import OocattnError
from oocattn.planning.machine import Device
from oocattn.planning.plan import Plan
from oocattn.records import Range, from_json, parse_json, to_json
from oocattn.storage.files.durable import write_text
from oocattn.storage.files.regular import read_file

MOST_RUNS, MOST_BYTES = 64, 1 << 16

LEAST_SECONDS = 5.0
"""Seconds of a run that is kept: a shorter one is mostly its start."""

PATIENCE = 1.0
"""Seconds to wait for another process that adds a run of its own."""

Time = Annotated[float, Range(1e-9, 1e12)]


@dataclass(frozen=True)
class PastRun:
    """The seconds that a run on a host with a kernel was predicted to take, and took without its waiting for cores."""

    host: str
    device: Device
    kernel: str
    predicted: Time
    seconds: Time


@dataclass(frozen=True)
class History:
    """The last runs, the newest at the end."""

    runs: tuple[PastRun, ...] = ()


def history_file() -> Path | None:
    """Where the history is, as the XDG base directory specification says; None for a user without a home."""
    chosen = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (chosen if chosen.is_absolute() else Path.home() / ".local" / "state") / "oocattn" / "predictions.json"
    except RuntimeError:
        return None


def keep_run(plan: Plan, seconds: float) -> None:
    """Add a run to the history, if it took long enough to tell."""
    path = history_file()
    if path is None or seconds < LEAST_SECONDS:
        return
    run = PastRun(platform.node(), plan.device, plan.kernel, plan.seconds, seconds)
    with suppress(OSError, OocattnError, ValueError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            runs = (*read_history(path).runs, run)[-MOST_RUNS:]
            write_text(path, json.dumps(to_json(History(runs))), synced=False)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold other processes that add a run back. Raises TimeoutError where one does not end."""
    descriptor, until = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while not _lock(descriptor):
            if time.monotonic() > until:
                raise TimeoutError(f"another process holds {folder}")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; False where another process has. A network file system may have no locks of folders."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def read_history(path: Path) -> History:
    """The history in a file; an empty one where that is missing, damaged or foreign."""
    with suppress(OSError, OocattnError, ValueError):
        return from_json(History, parse_json(read_file(path, MOST_BYTES)))
    return History()


def describe_history(plan: Plan) -> str:
    """Say how past plans with a plan's kernel compare with what their runs took; "" where no run is known."""
    path = history_file()
    here = (platform.node(), plan.device, plan.kernel)  # a home may be that of several hosts
    kept = () if path is None else read_history(path).runs
    runs = [run for run in kept if (run.host, run.device, run.kernel) == here]
    if not runs:
        return ""
    percent = round(100 * (_weighted_median((run.predicted / run.seconds, run.seconds) for run in runs) - 1))
    found = f"{abs(percent)}% {'high' if percent > 0 else 'low'}" if percent else "right"
    return f"plans here were {found} over {len(runs)} run{'s' * (len(runs) > 1)}"


def _weighted_median(weighted: Iterable[tuple[float, float]]) -> float:
    """The value up to which values have half of all weight: many short runs count no more than a long one."""
    ascending = sorted(weighted)
    sums = accumulate(weight for _, weight in ascending)
    half = sum(weight for _, weight in ascending) / 2
    return next(value for (value, _), reached in zip(ascending, sums, strict=True) if reached >= half)
