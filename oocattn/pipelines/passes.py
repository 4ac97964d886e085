"""The places of second passes, in the folder of job state of the result that they are of: who uses one, and its removal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from oocattn.storage.files import folders
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ALL_ROWS, SURVEY, ResultPaths
from oocattn.storage.results.growing import RunState
from oocattn.storage.results.locking import hold_lock

JUDGING = "judging"
"""The lock, in its folder of job state, of the process that has it computed and uses it."""

MADE = "added.zarr"
"""The group, in its folder of job state, in which the arrays of a survey are made."""


@contextmanager
def judging(paths: ResultPaths, until: float) -> Iterator[None]:
    """Hold the lock of who has a second pass computed and uses it; remove its folder of job state if that is empty then."""
    with removed_if_empty(paths.state), FileLock(paths.state / JUDGING, until):
        yield


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder afterwards, unless something is in it: a pass that can go on, or what others have put there."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def remove_pass(paths: ResultPaths, until: float) -> None:
    """Remove a second pass, finished or not, and its job state, while nobody else uses it (`judging`)."""
    folders.remove_ours(paths.state / MADE, folders.GROUP)
    with hold_lock(paths, until) as claim:
        state = RunState(paths, claim)
        state.tidy()
        state.remove()


def passes_over(paths: ResultPaths) -> Iterator[ResultPaths]:
    """The second passes over a result that have job state."""
    for name in (ALL_ROWS, SURVEY):
        found = ResultPaths.at(paths.state / name)
        if folders.is_folder(found.state):
            yield found
