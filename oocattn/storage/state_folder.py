"""The folder of job state of a result that lies in a store: where it is, and whose."""

from __future__ import annotations

import hashlib
import json
import uuid
from contextlib import suppress
from pathlib import Path

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.naming import named
from oocattn.storage.files.durable import read_json, write_text
from oocattn.storage.files.folders import is_folder
from oocattn.storage.locations import output_path, parse_location, resolve_path

STORE = "store"
"""As scratch: journal and partials are kept in the store of the result as well, so that another machine can resume."""

FOLDER_ID = "folder.json"
"""Tells a folder of job state from every other, so that a lock or a mark in a store is of this one, and says whose it is."""


def folder_of_url(url: str, scratch: str | Path | None) -> Path:
    """The folder of the result at a URL: `scratch`, or where that is None or `STORE` one of its own in the current folder.

    Raises ResultExistsError where another result has it.
    """
    if scratch is None or scratch == STORE:
        folder = _beside_caller(url, scratch == STORE)
    else:
        folder = resolve_path(output_path(scratch, "scratch folder"))
    _refuse_of_another(folder, url)
    return folder


def folder_of_store(name: str, scratch: str | Path | None) -> Path | None:
    """The folder of a result in a store of this process, of that name; None where it has none and `scratch` does not say.

    Raises as `folder_of_url`.
    """
    if scratch is None and not name:
        return None
    folder = _current() / f"{name}.oocattn" if scratch is None else output_path(scratch, "scratch folder")
    folder = resolve_path(folder)
    _refuse_of_another(folder, "")
    return folder


def state_of_url(typed: object, scratch: str | Path | None) -> tuple[str, Path] | None:
    """What messages call the result at a URL, and the folder here of its job state; without a look at the store.

    None for what is no URL. Raises as `folder_of_url`.
    """
    if not isinstance(typed, str) or (location := parse_location(typed, "result")).path is not None:
        return None
    url = str(location).rstrip("/")
    return url, folder_of_url(url, scratch)


def folder_id(state: Path, result: str) -> str:
    """The identity of a folder of job state, which it gets at the first call with the URL of its `result`, "" for no URL.

    The folder's lock is held.
    """
    found = known_folder_id(state)
    if not found:
        found = uuid.uuid4().hex
        write_text(state / FOLDER_ID, json.dumps({"id": found, **({"result": result} if result else {})}))
    return found


def known_folder_id(state: Path) -> str:
    """The identity of a folder of job state; "" where it has none."""
    return _recorded(state).get("id", "")


def _refuse_of_another(folder: Path, url: str) -> None:
    """Raise ResultExistsError where a folder has the job state of the result at another URL than this, "" for none."""
    other = _recorded(folder).get("result", url) if is_folder(folder) else url
    if other != url:
        mine = url or "a result in a store of this process"
        raise ResultExistsError(
            f"{folder} holds the job state of {other}, not of {mine}: give another folder as {named('scratch')}"
        )


def _recorded(state: Path) -> dict[str, str]:
    """The texts that a folder says of itself."""
    with suppress(IntegrityError):
        return {name: text for name, text in (read_json(state / FOLDER_ID) or {}).items() if isinstance(text, str)}
    return {}


def _beside_caller(url: str, mirrored: bool) -> Path:
    """A folder in the current one, called after a URL, of which others may have the same last part.

    A copy of what is in the store has a folder of its own, for it is replaced: no other run's is.
    """
    name, digest = url.rpartition("/")[2], hashlib.sha256(url.encode()).hexdigest()[:8]
    return resolve_path(_current() / f"{name}-{digest}.oocattn{'-store' if mirrored else ''}")


def _current() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ProblemError(
            f"the current folder was removed: change to one that is there, or give {named('scratch')}"
        ) from None
