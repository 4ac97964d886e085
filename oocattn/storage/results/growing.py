"""The growing result of a run: begun, found again, committed or removed.

Each step that others would see asks first whether the lock is still this run's (`Claim`). A run touches its own growing
result and no other, and removes files of its own patterns alone: what somebody else put in between is named and left.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.naming import setting
from oocattn.problem.given import GivenArrays
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files import folders
from oocattn.storage.files.durable import sync
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.journal.claims import Claim
from oocattn.storage.journal.journal import HEADER, remove_journal
from oocattn.storage.journal.lock import lock_holder
from oocattn.storage.make.create import DIMENSIONS, OwnStore, Separator, create_array, sync_metadata
from oocattn.storage.paths import (
    ATTEMPTS,
    ATTRIBUTES,
    CERTIFICATE,
    CERTIFICATE_PAGE,
    GROWING_NAME,
    MARKS,
    REPORT,
    STATUS,
    TRASH_NAME,
    ResultPaths,
    identity_at,
    recorded_attributes,
)
from oocattn.storage.results.arguments import read_given, write_given
from oocattn.storage.results.arrays import Chunks, ResultArrays
from oocattn.storage.results.publishing import LEFT_BESIDE, Publication, chunks_of

_LEFT_BESIDE = re.compile(
    r"(lock|judging|ready|report\.html|(plan|status|report|full-report|attempts|other-bits)\.json)\.[0-9a-f]{32}\.partial"
)

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Layout:
    """Shape [B, H, N, Dv], dtype, chunk rows and dimensions of `out`, attributes, and the arrays that are kept beside it."""

    shape: tuple[int, int, int, int]
    dtype: str
    chunk_rows: int
    attributes: Mapping[str, Any]
    given: GivenArrays = field(default_factory=GivenArrays)
    dimensions: Sequence[str] = DIMENSIONS


@dataclass(frozen=True)
class GrowingResult:
    """A result that is not complete, and the identity of the one it replaces. Of one in a store the `chunks` are there."""

    path: Path
    replaces: str | None
    chunks: Chunks | None = None

    @cached_property
    def arrays(self) -> ResultArrays:
        """The arrays, open for writing."""
        return ResultArrays.of(LocalStore(self.path), str(self.path), self.chunks)

    @property
    def name(self) -> str:
        """Its name in the folder of job state, which the journal keeps."""
        return self.path.name


@dataclass(frozen=True)
class RunState:
    """The places of a result, in the hands of the run that holds its lock."""

    paths: ResultPaths
    claim: Claim

    def begin(self, layout: Layout, *, overwrite: bool) -> GrowingResult:
        """Make the empty result: `out` [B, H, N, Dv] and `lse` [B, H, N], and the arrays that its problem was given.

        What an unfinished run has left is removed. With `overwrite` it is to replace the result that is there now. Raises
        ProblemError where it could not be given its name later, and ResultExistsError where a file of somebody else's would
        be removed, now or then.
        """
        paths, publication, keys = self.paths, self._publication, list[str]()
        self._check()
        self._refuse_foreign()
        if publication is None:
            self._refuse_to_move(overwrite)
        else:
            keys = publication.refuse(overwrite=overwrite)
        self._remove_journal()
        if publication is None:
            self._restore()
            if not overwrite and paths.is_taken():
                raise ResultExistsError(
                    f"{paths.result} exists: choose another path, or replace it with {setting('overwrite', True)}"
                )
        # A result that could not be restored was replaced, by a run that was killed before it removed it.
        self._throw_away(*self._found(GROWING_NAME), paths.scratch, paths.replaced)
        folders.remove_file(paths.status)
        if publication is not None or not paths.is_taken():
            self._forget_certificate()  # else it is of the result that is there until the commit
        with name_failure("make", paths.scratch):
            paths.scratch.mkdir()
        growing = paths.state / f"result-{uuid.uuid4().hex[:8]}.zarr"
        with name_failure("make", growing):
            group = zarr.create_group(OwnStore(growing), attributes={ATTRIBUTES: dict(layout.attributes)}, zarr_format=3)
            separator: Separator = "." if publication is None else "/"
            names = layout.dimensions
            create_array(group, "out", layout.shape, layout.dtype, layout.chunk_rows, dimensions=names, separator=separator)
            create_array(group, "lse", layout.shape[:3], "float32", layout.chunk_rows, dimensions=names, separator=separator)
            write_given(group, layout.given, separator)
        sync_metadata(growing)
        if publication is not None:
            publication.begin(growing, keys)
        if paths.mirror is not None:
            paths.mirror.push(growing)
        replaces = paths.identity() if publication is None else None
        return GrowingResult(growing, replaces, chunks_of(paths, self.claim))

    def _refuse_to_move(self, overwrite: bool) -> None:
        """Raise where what grows in the folder of job state could not be given the result's name."""
        state, result = self.paths.state, self.paths.folder
        with name_failure("look at", state):
            elsewhere = state.stat().st_dev != result.parent.stat().st_dev
        if elsewhere:
            raise ProblemError(
                f"{state} is on another file system than {result.parent}: what grows there cannot be moved to its place; "
                "choose another path"
            )
        if overwrite:
            folders.refuse_foreign(result, folders.GROUP)

    def resume(self, growing: GrowingResult, layout: Layout) -> None:
        """Have a result that has begun to grow ready for more to be written.

        Raises IntegrityError where it is not what `begin` made of the same layout, or a folder in it is a link.
        """
        path = growing.path
        self._check()
        with suppress(FileExistsError), name_failure("make", self.paths.scratch):
            self.paths.scratch.mkdir()
        for folder in (path, path / "out", path / "lse", self.paths.scratch, self.paths.state / "finished"):
            if not folders.is_folder(folder):
                raise IntegrityError(
                    f"{folder} is not a folder: the unfinished run is damaged: begin again with {setting('overwrite', True)}"
                )
        found = {name: (array.shape, array.dtype, array.chunks) for name, array in growing.arrays.by_name.items()}
        out, lse = (1, 1, layout.chunk_rows, layout.shape[3]), (1, 1, layout.chunk_rows)
        dtype, recorded = numpy_dtype(layout.dtype), recorded_attributes(path)
        expected = {"out": (layout.shape, dtype, out), "lse": (layout.shape[:3], np.dtype(np.float32), lse)}
        differing = [name for name in expected if found[name] != expected[name]]
        differing += [name for name, value in layout.attributes.items() if recorded.get(name) != value]
        if differing:
            raise IntegrityError(
                f"{path}: the metadata of the unfinished result is damaged ({', '.join(differing)}): "
                f"begin again with {setting('overwrite', True)}"
            )
        read_given(path, layout.given.digests)
        if self._publication is not None:
            self._publication.resume(path)

    # The commit, under the lock. It can be repeated from any step at which it failed.
    #   1. Ask whether the lock is still this run's.
    #   2. Where something is at the result's path that was not there when the run began, refuse.
    #   3. Where the result that is to be replaced is there, give it another name in the folder of job state.
    #   4. Give the complete result its name, unless something has it by now, and sync the folder.
    def commit(self, growing: GrowingResult) -> None:
        """Give the complete result its name.

        Raises ResultExistsError where something is there that the run may not replace, LockedError where the lock was
        lost, and OSError as the file system does.
        """
        self._check()
        if self._publication is not None:
            self._publication.commit(growing.path)
            return
        result, replaced = self.paths.folder, self.paths.replaced
        if folders.is_folder(growing.path):
            found = identity_at(result)
            if found is not None:
                if found != growing.replaces:
                    raise self._appeared_error()
                folders.refuse_foreign(result, folders.GROUP)
                rename_new(result, replaced)
                if identity_at(replaced) != found:  # exchanged between two looks
                    rename_new(replaced, result)
                    raise self._appeared_error()
            self._forget_certificate()  # of the result that was replaced
            try:
                rename_new(growing.path, result)
            except FileExistsError:
                raise self._appeared_error() from None
        sync(result.parent)

    def _appeared_error(self) -> ResultExistsError:
        return ResultExistsError(
            f"{self.paths.result} has appeared, or was replaced, while the run was under way: move it away and resume"
        )

    def tidy(self) -> None:
        """Remove the job state of a complete result, but report and certificate."""
        self._check()
        self._remove_journal()
        if self._publication is not None:
            self._publication.tidy()  # after the journal: a run with one has its mark
            self._publication.keep_attempts()
        self._throw_away(self.paths.scratch, self.paths.replaced, *self._found(GROWING_NAME), *self._found(TRASH_NAME))
        folders.remove_file(self.paths.status)
        self._remove_partials()

    def discard(self, growing: GrowingResult) -> None:
        """Remove what a run has done, for it cannot be trusted."""
        self._check()
        if self._publication is None:
            self._restore()
        self._remove_journal()
        self._throw_away(growing.path, self.paths.scratch)
        for path in (self.paths.status, self.paths.state / ATTEMPTS):
            folders.remove_file(path)
        if self._publication is not None:
            self._publication.discard()

    def remove(self) -> None:
        """Remove a finished local result, and what its run left beside it."""
        self._check()
        self._forget_certificate()
        self._throw_away(self.paths.folder)
        for name in (REPORT, ATTEMPTS, STATUS):
            folders.remove_file(self.paths.state / name)
        self._remove_partials()

    def remove_leftovers(self) -> None:
        """Remove what writes that were killed have left in the folders of this run."""
        self._check()
        for folder in (*self._found(GROWING_NAME), self.paths.scratch, self.paths.state / "finished"):
            folders.remove_ours(folder, folders.LEFTOVERS, keep_folders=True)
        self._remove_partials()

    def _remove_partials(self) -> None:
        """Remove what writes that were killed have left in the folder of job state."""
        for path in self._found(_LEFT_BESIDE):
            if not _is_waiting(path):
                folders.remove_file(path)

    def _remove_journal(self) -> None:
        """Remove the journal; with it goes all that this run, or an earlier one, has kept in the store."""
        remove_journal(self.paths.state)
        if self.paths.any_mirror is not None:
            self.paths.any_mirror.clear()

    @property
    def _publication(self) -> Publication | None:
        """The result, where it is in a store."""
        return None if self.paths.stored is None else Publication(self.paths, self.paths.stored)

    def _check(self) -> None:
        """Raise where the lock was lost, or the folder is not this user's own."""
        folders.require_own(self.paths.state)
        self.claim.check()

    def _restore(self) -> None:
        """Give a replaced result its name back, unless something has it."""
        if folders.is_folder(self.paths.replaced):
            with suppress(FileExistsError):
                rename_new(self.paths.replaced, self.paths.folder)
                sync(self.paths.folder.parent)

    def _refuse_foreign(self) -> None:
        """Raise ResultExistsError where a folder to be removed has foreign files."""
        folders.refuse_foreign(self.paths.scratch, folders.CHECKPOINTS)
        folders.refuse_foreign(self.paths.state / "finished", folders.JOURNAL)
        for folder in (*self._found(GROWING_NAME), self.paths.replaced):
            folders.refuse_foreign(folder, folders.GROUP)

    def _found(self, pattern: re.Pattern[str]) -> list[Path]:
        return [self.paths.state / name for name in folders.names_in(self.paths.state) if pattern.fullmatch(name)]

    def _throw_away(self, *places: Path) -> None:
        """Remove folders; rename them first, so that late writers do not find them."""
        for folder in places:
            if folders.is_folder(folder) and not TRASH_NAME.fullmatch(folder.name):
                with name_failure("rename", folder):
                    os.rename(folder, self.paths.state / f"trash-{uuid.uuid4().hex[:8]}")
        for trash in self._found(TRASH_NAME):
            if not folders.remove_ours(trash, (*folders.GROUP, *folders.CHECKPOINTS, *folders.JOURNAL)):
                foreign = folders.find_foreign(trash, folders.GROUP) or trash
                logger.warning("%s was not removed: oocattn did not write it; move it away", foreign)

    def _forget_certificate(self) -> None:
        """Remove what is said of another result."""
        reports = (name for name, ours in self.paths.are_ours(*MARKS).items() if ours is not False)
        self.paths.forget(CERTIFICATE, CERTIFICATE_PAGE, *reports)


def _is_waiting(path: Path) -> bool:
    """Whether this is the file by which a live process waits for the lock."""
    if not path.name.startswith(("lock.", "judging.")):
        return False
    try:
        return lock_holder(path) is not None
    except IntegrityError:
        return False
    except OSError:  # nothing is known of it
        return True


def is_untidy(paths: ResultPaths) -> bool:
    """Whether a run was killed between its commit and its tidying up."""
    if paths.stored is None and paths.unfinished is not None:
        return False
    if paths.beside is not None and any(map(LEFT_BESIDE.fullmatch, paths.beside.list())):
        return True
    if paths.state_folder is None:
        return False
    return any(map(folders.is_taken, (paths.state / HEADER, paths.scratch, paths.replaced, paths.status, paths.lock)))
