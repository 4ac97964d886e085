"""How well plans predicted the runs of this user on this machine: the last of them, in a small file of the user's state.

Nothing depends on it. What is damaged is as if it was not there, and where it cannot be written nothing is kept.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from oocattn.errors import OocattnError
from oocattn.planning.machine import Device
from oocattn.records import Range, from_json, parse_json, to_json
from oocattn.storage.files.durable import write_text
from oocattn.storage.files.regular import read_file

MOST_RUNS, MOST_BYTES = 64, 1 << 16

LEAST_SECONDS = 1.0
"""Seconds of a run that is kept: a shorter one is mostly its start."""

Time = Annotated[float, Range(1e-9, 1e12)]


@dataclass(frozen=True)
class PastRun:
    """The seconds that a run on a host was predicted to take, and took."""

    host: str
    device: Device
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


def keep_run(device: Device, predicted: float, seconds: float) -> None:
    """Add a run to the history, if it took long enough to tell."""
    path = history_file()
    if path is None or seconds < LEAST_SECONDS:
        return
    with suppress(OSError, OocattnError, ValueError):
        runs = (*read_history(path).runs, PastRun(platform.node(), device, predicted, seconds))[-MOST_RUNS:]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(to_json(History(runs))), synced=False)


def read_history(path: Path) -> History:
    """The history in a file; an empty one where that is missing, damaged or foreign."""
    with suppress(OSError, OocattnError, ValueError):
        return from_json(History, parse_json(read_file(path, MOST_BYTES)))
    return History()


def describe_history(device: Device) -> str:
    """Say how the seconds of past plans for a device compare with what their runs took; "" where no run is known."""
    path = history_file()
    here = (platform.node(), device)  # a home may be that of several hosts
    runs = [] if path is None else [run for run in read_history(path).runs if (run.host, run.device) == here]
    if not runs:
        return ""
    percent = round(100 * (median(run.predicted / run.seconds for run in runs) - 1))
    found = f"{abs(percent)}% {'high' if percent > 0 else 'low'}" if percent else "right"
    return f"plans here were {found} over {len(runs)} run{'s' * (len(runs) > 1)}"
