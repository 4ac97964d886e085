"""The places of a run: its result, and the folder of job state, beside it or where the caller says.

While it runs, everything is in `RESULT.oocattn/`: the growing result, the journal, scratch, the lock and the status.
When it is complete the result is renamed to `RESULT`; only the report stays behind, and the certificate of `verify`.
Of a result in a store the chunks are there from the beginning, and the folder is empty in the end
(`oocattn.storage.results.stored`).
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
from typing import TYPE_CHECKING, Any, TypeAlias

from oocattn.errors import IntegrityError, ProblemError
from oocattn.naming import named
from oocattn.pages import HTML_MARK
from oocattn.records import parse_json
from oocattn.storage.files.durable import MOST_RECORD, make_durably, read_json, write_text
from oocattn.storage.files.folders import is_folder, is_taken, remove_file, require_own, status_of
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import open_regular, read_exactly, read_file
from oocattn.storage.journal.journal import read_header
from oocattn.storage.locations import OpenResult, parse_location, resolve_path
from oocattn.storage.nodes import group_attributes
from oocattn.storage.state_folder import STORE, folder_of_store, folder_of_url

if TYPE_CHECKING:  # Zarr takes half a second, and `status` of a local result does without
    from zarr.storage import StorePath

    from oocattn.storage.remote.mirror import Mirror
    from oocattn.storage.remote.objects import Objects
    from oocattn.storage.remote.options import StorageOptions
    from oocattn.storage.results.stored import StoredResult
    from oocattn.storage.zarr_compat import Store

ATTRIBUTES = "oocattn"
"""The one attribute of a result group: what it is the answer to."""

REPORT, CERTIFICATE, CERTIFICATE_PAGE = "report.json", "certificate.json", "certificate.html"
ATTEMPTS, REPORT_PAGE, FULL_REPORT = "attempts.json", "report.html", "full-report.json"
"""What stays beside a result."""

MARKS = {REPORT_PAGE: HTML_MARK, FULL_REPORT: '{\n "format": 1,\n "producer": "oocattn",'}
"""How the full report begins, by which ours is told from what somebody else has put there."""

LOCK, STATUS = "lock", "status.json"
"""In the folder of job state: who works on the result, and how far the run is."""

ALL_ROWS, SURVEY = "all-rows.zarr", "survey.zarr"
"""In it, the results of second passes: of one that proves every row, and of one that is surveyed."""

GROWING_NAME = re.compile(r"result-[0-9a-f]{8}\.zarr")
TRASH_NAME = re.compile(r"trash-[0-9a-f]{8}")


ResultLike: TypeAlias = "str | Path | Store | StorePath | OpenResult"
"""A result as callers give it: a path, a URL, a Zarr store, or a `Result`."""

LOCKS = ("auto", "none")
"""How runs to a result in a store keep away from each other: by its conditional put, or as the caller sees to it."""


@dataclass(frozen=True)
class ResultPaths:
    """The places of one result; `state_folder` is that of job state, and `lock_kind` one of `LOCKS`.

    Where job state is `mirrored`, the folder is the copy of this machine.
    """

    result: Path | StoredResult
    state_folder: Path | None
    lock_kind: str = "auto"
    mirrored: bool = False

    @classmethod
    def at(
        cls,
        typed: ResultLike,
        scratch: str | Path | None = None,
        lock: str = "auto",
        storage_options: StorageOptions | None = None,
    ) -> ResultPaths:
        """The places of the result at a path or a URL, in a Zarr store, or as it is open.

        `scratch` is the folder of job state of a result that is in no folder, or `STORE`. Raises ProblemError for what is no
        place of a result, and where scratch or lock are given of a local one.
        """
        typed = getattr(typed, "result_place", typed)
        local = _local(typed)
        if local is not None:
            if scratch is not None or lock != "auto":
                given = named("scratch" if scratch is not None else "lock")
                raise ProblemError(
                    f"result {local} is a local path, and {given} is given: it keeps both beside it; leave that out"
                )
            return cls(local, local.with_name(local.name + ".oocattn"))
        from oocattn.storage.results import stored

        result = stored.stored_result(typed, storage_options)
        mirrored = scratch == STORE
        if mirrored and result.beside is None:
            raise ProblemError(f"result: {result} takes nothing but the result: give a folder as {named('scratch')}")
        of_process = result.is_of_this_process
        folder = folder_of_store(result.name, scratch) if of_process else folder_of_url(str(result), scratch)
        return cls(result, folder, lock, mirrored)

    @property
    def state(self) -> Path:
        """The folder of job state. Raises ProblemError where there is none."""
        if self.state_folder is None:
            raise ProblemError(
                f"result: {self.result} has no name: say with {named('scratch')} in which folder the job state is to be"
            )
        return self.state_folder

    @property
    def mirror(self) -> Mirror | None:
        """Where job state is kept in the store as well."""
        return self.any_mirror if self.mirrored else None

    @property
    def any_mirror(self) -> Mirror | None:
        """The same, also where only an earlier run has kept it there."""
        if self.stored is None or self.stored.scratch is None:
            return None
        from oocattn.storage.remote.mirror import Mirror

        return Mirror(self.state, self.stored.scratch)

    @property
    def stored(self) -> StoredResult | None:
        """The result, where it is in a store; None for a local one."""
        return None if isinstance(self.result, Path) else self.result

    @property
    def folder(self) -> Path:
        """The folder of a local result."""
        if not isinstance(self.result, Path):
            raise TypeError(f"{self.result} is in no folder")
        return self.result

    @property
    def unfinished(self) -> Path | None:
        """The growing result of the run in the journal; None where there is none.

        Every run has another name for it: a worker of a run that is gone cannot write into that of the next. Raises
        IntegrityError for a journal that is damaged.
        """
        if self.state_folder is None:
            return None
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
        return self.state / LOCK

    @property
    def status(self) -> Path:
        return self.state / STATUS

    @property
    def report(self) -> Path:
        """The report of a local result."""
        return self.state / REPORT

    @property
    def certificate(self) -> Path:
        """The certificate of a local result."""
        return self.state / CERTIFICATE

    @property
    def certificate_page(self) -> Path:
        """The same, to be looked at."""
        return self.state / CERTIFICATE_PAGE

    def make_state(self) -> None:
        """Make the folder of job state, if it is not there. Raises IntegrityError where it is a link, or another user's."""
        if not is_taken(self.state):
            make_durably(self.state)
        require_own(self.state)

    def is_taken(self) -> bool:
        """Whether anything is at the result's place."""
        return is_taken(self.result) if isinstance(self.result, Path) else self.result.is_taken()

    def is_published(self) -> bool:
        """Whether a result in a store is there, though its run may have been killed before it ended."""
        return self.stored is not None and self.is_taken()

    def attributes(self) -> dict[str, Any] | None:
        """The attributes of the complete result; None where nothing is there."""
        if self.stored is None:
            return recorded_attributes(self.result) if self.is_taken() else None
        found = self.stored.attributes()
        return None if found is None else _ours_of(found)

    def identity(self) -> str | None:
        """An identity of what is at the result's place; None where there is nothing."""
        if isinstance(self.result, Path):
            return identity_at(self.result)
        found = self.result.read("zarr.json")
        return None if found is None else hashlib.sha256(found).hexdigest()[:16]

    def load(self, name: str, most: int = MOST_RECORD) -> dict[str, Any] | None:
        """The JSON object of that name beside the result, or None. Raises IntegrityError for a damaged one."""
        objects = self.beside
        if objects is None:
            folder = self.state_folder
            return read_json(folder / name, most) if folder is not None and is_folder(folder) else None
        content = objects.read(name, most)
        try:
            return None if content is None else parse_json(content)
        except ValueError as error:
            raise IntegrityError(f"{objects}/{name}: {error}") from None

    def are_ours(self, *names: str) -> dict[str, bool | None]:
        """Whether oocattn wrote what has the name of a part of the full report beside the result; None: nothing has."""
        if self.beside is None:
            return {name: self._is_ours(name) for name in names}
        marks = {name: MARKS[name].encode() for name in names}
        starts = self.beside.read_starts({name: len(mark) for name, mark in marks.items()})
        return {name: None if starts[name] is None else starts[name] == mark for name, mark in marks.items()}

    def _is_ours(self, name: str) -> bool | None:
        mark = MARKS[name].encode()
        if self.state_folder is None or not is_taken(self.state / name):
            return None
        try:
            with open_regular(self.state / name, follow=False) as descriptor:
                return read_exactly(descriptor, len(mark), 0, self.state / name) == mark
        except IntegrityError:  # no regular file
            return False

    def save(self, texts: Mapping[str, str]) -> tuple[str, ...]:
        """Write texts of these names beside the result, durably; return where they are."""
        objects = self.beside
        if objects is None:
            self.make_state()
            for name, text in texts.items():
                write_text(self.state / name, text)
            return tuple(str(self.state / name) for name in texts)
        objects.write_each({name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()})
        return tuple(f"{objects}/{name}" for name in texts)

    def forget(self, *names: str) -> None:
        """Remove what has these names beside the result."""
        if self.beside is not None:
            self.beside.remove_each(names)
            return
        for name in names:
            remove_file(self.state / name)

    @property
    def beside(self) -> Objects | None:
        """The objects beside a result in a store; None where report and certificate are in the folder of job state."""
        return None if isinstance(self.result, Path) else self.result.beside


def recorded_attributes(group: Path | StoredResult) -> dict[str, Any]:
    """The attributes of a result group; none where no group is. Raises IntegrityError where it is damaged."""
    return _ours_of(group_attributes(group))


def _ours_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = attributes.get(ATTRIBUTES)
    return dict(found) if isinstance(found, Mapping) else {}


def _local(typed: object) -> Path | None:
    """The path that a caller means by a result; None for a URL or a store. Raises ProblemError for anything else."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(typed).__mro__}
    if kinds & {"zarr.Store", "zarr.StorePath"}:
        store: Any = getattr(typed, "store", typed)
        root = getattr(store, "root", None)  # a LocalStore's
        if not isinstance(root, Path):
            return None
        if store.read_only:
            raise ProblemError(f"result: the store at {root} is read-only: open it for writing")
        typed = root / getattr(typed, "path", "")
    location = parse_location(typed, "result")
    if location.path is None:
        return None
    result = resolve_path(location.path)
    if not result.name:
        raise ProblemError(f"result {result}: expected a path with a name for the Zarr group; add one")
    return result


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
