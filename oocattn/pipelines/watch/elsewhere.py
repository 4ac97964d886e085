"""Runs to results in stores, as they are seen from another folder or machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from oocattn.storage.files.folders import is_folder
from oocattn.storage.journal.claims import Holder
from oocattn.storage.journal.lock import lock_holder
from oocattn.storage.paths import ResultPaths
from oocattn.storage.state_folder import known_folder_id


@contextmanager
def seen_from_here(paths: ResultPaths) -> Iterator[tuple[ResultPaths, Holder | None]]:
    """Give the places where the state of a run can be read, and who holds its lock in the store.

    Job state that is kept in the store is read there, unless the run goes on in the folder here.
    """
    if paths.mirror is None or (is_folder(paths.state) and lock_holder(paths.lock) is not None):
        yield paths, None
        return
    with tempfile.TemporaryDirectory() as folder:
        seen = replace(paths, state_folder=Path(folder))
        if seen.mirror is not None:
            seen.mirror.pull(whole=False)
        yield seen, _holder_in_store(paths)


def run_elsewhere(paths: ResultPaths) -> dict[str, Any]:
    """What is known of a run whose job state is not here: the fields `state`, `holder` and `error` of its status."""
    from oocattn.storage.results.marks import describe_mark, mark_of_other

    holder, mark = _holder_in_store(paths), mark_of_other(paths)
    if holder is not None:
        where = "" if mark is None else f", with its job state {describe_mark(mark)}"
        return {"state": "running", "holder": f"{holder}, unless it has died{where}"}
    if mark is None:
        return {"state": "none"}
    return {"state": "interrupted", "error": f"its job state is {describe_mark(mark)}"}


def _holder_in_store(paths: ResultPaths) -> Holder | None:
    """Who holds the lock in the store of a result, or left it behind; None also for a run that died in the folder here."""
    from oocattn.storage.journal.store_lock import store_lock_holder

    if paths.beside is None:
        return None
    here = paths.state_folder is not None and is_folder(paths.state)
    return store_lock_holder(paths.beside, known_folder_id(paths.state) if here else "")
