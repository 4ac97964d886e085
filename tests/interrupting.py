"""Interrupts a run at an event, and gives the result that it must have in the end."""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from distributed import Client
from support import (
    carry_out,
    normal_arrays,
    write_dataset,
)

import oocattn
from oocattn import Event, Plan, Result

TOKENS = 170
"""Tokens of the datasets in tests of resuming: 7 chunks of 25 rows, the last of 20."""


def write_resuming_dataset(folder: Path) -> Path:
    """A dataset of two head groups."""
    return write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))


_results: dict[str, Result] = {}
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def uninterrupted(plan: Plan, dataset: Path) -> Result:
    """The result of a plan where nothing goes wrong, to compare bits with; not to be changed.

    It is computed inline, once for each plan's digest and content of the dataset: bits depend on nothing else.
    """
    files = sorted(path for path in dataset.rglob("*") if path.is_file())
    content = hashlib.sha256(plan.digest.encode())
    for path in files:
        content.update(f"{path.relative_to(dataset)}\n".encode() + path.read_bytes())
    key = content.hexdigest()
    if key not in _results:
        _results[key] = carry_out(plan, dataset, Path(_folder.name) / f"{key}.zarr")
    return _results[key]


class EnoughError(BaseException):
    """What interrupts a run: an Exception of a listener would not."""


def interrupt(kind: str, count: int) -> Callable[[Event], None]:
    """A listener that raises at the `count`-th event of a kind."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == kind:
            seen.append(event)
            if len(seen) == count:
                raise EnoughError

    return listen


def interrupted(
    plan: Plan,
    dataset: Path,
    result: Path,
    kind: str = "written",
    count: int = 5,
    client: Client | Literal["inline"] = "inline",
) -> None:
    with pytest.raises(EnoughError):
        carry_out(plan, dataset, result, client, callbacks=[interrupt(kind, count)])
    assert oocattn.status(result).state == "interrupted"


def kill_at(count: int, process: int) -> Callable[[Event], None]:
    """A listener that kills a process at the `count`-th subproblem."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == "attended":
            seen.append(event)
            if len(seen) == count:
                os.kill(process, signal.SIGKILL)

    return listen
