"""The mark beside an unfinished result in a store: whose its objects are, and where the job state of that run is."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import Annotated

from oocattn.errors import IntegrityError
from oocattn.naming import named, setting
from oocattn.records import ADDED, Excerpt, from_json
from oocattn.storage.files.folders import is_folder, remove_file
from oocattn.storage.paths import ResultPaths
from oocattn.storage.state_folder import FOLDER_ID, STORE, folder_id, known_folder_id
from oocattn.text import printable

MARK = "run.json"


@dataclass(frozen=True)
class Mark(Excerpt):
    """Says whose the objects of an unfinished result are: the run's with this growing result, in a folder of a host.

    `lock` is how that run is kept apart from others.
    """

    result: str
    folder: str
    state: str
    host: str
    lock: Annotated[str, ADDED] = "auto"


def id_of_folder(paths: ResultPaths) -> str:
    """The identity of the folder of job state, which records whose it is. Its lock is held."""
    stored = paths.stored
    return folder_id(paths.state, "" if stored is None or stored.is_of_this_process else str(stored))


def make_mark(paths: ResultPaths, growing: str) -> None:
    """Mark the place of a result as that of the run with this growing result."""
    place = STORE if paths.mirrored else str(paths.state)
    mark = Mark(growing, id_of_folder(paths), place, socket.gethostname(), paths.lock_kind)
    paths.save({MARK: json.dumps(asdict(mark))})


def read_mark(paths: ResultPaths) -> Mark | None:
    """The mark beside a result in a store; None where there is none."""
    if paths.stored is None:
        return None
    try:
        found = paths.load(MARK)
        return None if found is None else from_json(Mark, found)
    except (ValueError, IntegrityError):
        return None


def is_from_here(paths: ResultPaths, mark: Mark) -> bool:
    """Whether the job state of a mark's run is where that of `paths` is: what is not there is nowhere."""
    if paths.mirrored and mark.state == STORE:
        return True
    here = paths.state_folder is not None and is_folder(paths.state)
    return here and mark.folder == known_folder_id(paths.state)


def mark_of_other(paths: ResultPaths) -> Mark | None:
    """The mark of a run whose job state is elsewhere; None where there is none."""
    mark = read_mark(paths)
    return None if mark is None or is_from_here(paths, mark) else mark


def describe_mark(mark: Mark) -> str:
    """Where the job state of a run is."""
    if mark.state == STORE:
        return f"in the store ({setting('scratch', STORE)})"
    return printable(f"in {mark.state} on host {mark.host} ({named('scratch')})")


def forget_folder(paths: ResultPaths) -> None:
    """Remove the identity of a folder in which no run is left, also none of which only the mark is there."""
    if not paths.mirrored:
        mark = read_mark(paths)
        if paths.unfinished is not None or (mark is not None and mark.folder == known_folder_id(paths.state)):
            return
    remove_file(paths.state / FOLDER_ID)
