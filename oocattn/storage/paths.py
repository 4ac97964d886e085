"""The places of a run: its result, and the folder of job state beside it.

While it runs, everything is in `RESULT.oocattn/`: the growing result, the journal, scratch, the lock and the status.
When it is complete the result is renamed to `RESULT`; only the report stays behind, and the certificate of `verify`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oocattn.errors import IntegrityError, ProblemError
from oocattn.storage.files.durable import MOST_RECORD, make_durably
from oocattn.storage.files.folders import is_folder, is_taken, require_own, status_of
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import read_file
from oocattn.storage.journal.journal import read_header
from oocattn.storage.locations import output_path, resolve_path
from oocattn.storage.nodes import folder_attributes

ATTRIBUTES = "oocattn"
"""The one attribute of a result group: what it is the answer to."""

GROWING_NAME = re.compile(r"result-[0-9a-f]{8}\.zarr")
TRASH_NAME = re.compile(r"trash-[0-9a-f]{8}")


@dataclass(frozen=True)
class ResultPaths:
    """The places of one result."""

    result: Path

    @classmethod
    def at(cls, path: str | Path) -> ResultPaths:
        """The places of the result at `path`. Raises ProblemError for a URL of another host: results are local."""
        result = resolve_path(output_path(path, "result"))
        if not result.name:
            raise ProblemError(f"result {result}: expected a path with a name for the Zarr group; add one")
        return cls(result)

    @property
    def state(self) -> Path:
        """The folder of job state."""
        return self.result.with_name(self.result.name + ".oocattn")

    @property
    def unfinished(self) -> Path | None:
        """The growing result of the run in the journal; None where there is none.

        Every run has another name for it: a worker of a run that is gone cannot write into that of the next. Raises
        IntegrityError for a journal that is damaged.
        """
        name = (read_header(self.state) or {}).get("result")
        if not (isinstance(name, str) and GROWING_NAME.fullmatch(name)):
            return None
        return self.state / name if is_folder(self.state / name) else None

    @property
    def replaced(self) -> Path:
        """The result that another one takes the place of, for the moment in which it does."""
        return self.state / "replaced.zarr"

    @property
    def scratch(self) -> Path:
        """The folder of partials."""
        return self.state / "partials"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def status(self) -> Path:
        return self.state / "status.json"

    @property
    def report(self) -> Path:
        return self.state / "report.json"

    @property
    def certificate(self) -> Path:
        return self.state / "certificate.json"

    @property
    def certificate_page(self) -> Path:
        return self.state / "certificate.html"

    def make_state(self) -> None:
        """Make the folder of job state, if it is not there. Raises IntegrityError where it is a link, or another user's."""
        if not is_taken(self.state):
            make_durably(self.state)
        require_own(self.state)

    def attributes(self) -> dict[str, Any] | None:
        """The attributes of the complete result; None where nothing is there."""
        return recorded_attributes(self.result) if is_taken(self.result) else None


def recorded_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the result group at `path`; none where no group is. Raises IntegrityError where it is damaged."""
    found = folder_attributes(path).get(ATTRIBUTES)
    return dict(found) if isinstance(found, Mapping) else {}


def identity_at(path: Path) -> str | None:
    """An identity of the file or folder at a path; None where there is nothing.

    Of a result it is what its metadata say, and when they came to be there: inodes are not for good everywhere.
    """
    found = status_of(path)
    if found is None:
        return None
    metadata = path / "zarr.json"
    with suppress(FileNotFoundError, NotADirectoryError, IntegrityError), name_failure("look at", metadata):
        content = hashlib.sha256(read_file(metadata, MOST_RECORD)).hexdigest()[:16]
        if stat.S_ISDIR(found.st_mode):
            return f"{os.stat(metadata).st_ctime_ns}-{content}"
    return f"{found.st_ino}-"
