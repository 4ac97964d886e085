"""The growing result of a run: begun, found again, committed or removed.

Each step that others would see asks first whether the lock is still this run's (`Claim`). A run touches its own growing
result and no other, and removes files of its own patterns alone: what somebody else put in between is named and left.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.problem.given import GivenArrays
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files import folders
from oocattn.storage.files.durable import sync
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.journal.claims import Claim
from oocattn.storage.journal.journal import HEADER, remove_journal
from oocattn.storage.journal.lock import lock_holder
from oocattn.storage.make.create import OwnStore, create_array, sync_metadata
from oocattn.storage.paths import ATTRIBUTES, GROWING_NAME, TRASH_NAME, ResultPaths, identity_at, recorded_attributes
from oocattn.storage.results.arguments import read_given, write_given
from oocattn.storage.results.arrays import ResultArrays

_LEFT_BESIDE = re.compile(r"(lock|ready|(plan|status|report|other-bits)\.json)\.[0-9a-f]{32}\.partial")

_AGAIN = "begin again with overwrite=True (--overwrite)"

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Layout:
    """Shape [B, H, N, Dv], dtype and chunk rows of `out`, attributes, and the arrays that are kept beside it."""

    shape: tuple[int, int, int, int]
    dtype: str
    chunk_rows: int
    attributes: Mapping[str, Any]
    given: GivenArrays = field(default_factory=GivenArrays)


@dataclass(frozen=True)
class GrowingResult:
    """A result that is not complete, and the identity of the one it replaces."""

    path: Path
    replaces: str | None

    @cached_property
    def arrays(self) -> ResultArrays:
        """The arrays, open for writing."""
        return ResultArrays.of(LocalStore(self.path))

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
        paths = self.paths
        self._check()
        with name_failure("look at", paths.state):
            elsewhere = paths.state.stat().st_dev != paths.result.parent.stat().st_dev
        if elsewhere:
            raise ProblemError(
                f"{paths.state} is on another file system than {paths.result.parent}: what grows there cannot be moved to "
                "its place; choose another path"
            )
        self._refuse_foreign()
        if overwrite:
            folders.refuse_foreign(paths.result, folders.GROUP)
        remove_journal(paths.state)
        self._restore()
        if not overwrite and folders.is_taken(paths.result):
            raise ResultExistsError(f"{paths.result} exists: choose another path, or replace it (--overwrite)")
        # A result that could not be restored was replaced, by a run that was killed before it removed it.
        self._throw_away(*self._found(GROWING_NAME), paths.scratch, paths.replaced)
        folders.remove_file(paths.status)
        if not folders.is_taken(paths.result):
            self._forget_certificate()  # else it is of the result that is there until the commit
        with name_failure("make", paths.scratch):
            paths.scratch.mkdir()
        growing = paths.state / f"result-{uuid.uuid4().hex[:8]}.zarr"
        with name_failure("make", growing):
            group = zarr.create_group(OwnStore(growing), attributes={ATTRIBUTES: dict(layout.attributes)}, zarr_format=3)
            create_array(group, "out", layout.shape, layout.dtype, layout.chunk_rows)
            create_array(group, "lse", layout.shape[:3], "float32", layout.chunk_rows)
            write_given(group, layout.given)
        sync_metadata(growing)
        return GrowingResult(growing, identity_at(paths.result))

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
                raise IntegrityError(f"{folder} is not a folder: the unfinished run is damaged: {_AGAIN}")
        found = {name: (array.shape, array.dtype, array.chunks) for name, array in growing.arrays.by_name.items()}
        out, lse = (1, 1, layout.chunk_rows, layout.shape[3]), (1, 1, layout.chunk_rows)
        dtype, recorded = numpy_dtype(layout.dtype), recorded_attributes(path)
        expected = {"out": (layout.shape, dtype, out), "lse": (layout.shape[:3], np.dtype(np.float32), lse)}
        differing = [name for name in expected if found[name] != expected[name]]
        differing += [name for name, value in layout.attributes.items() if recorded.get(name) != value]
        if differing:
            raise IntegrityError(
                f"{path}: the metadata of the unfinished result is damaged ({', '.join(differing)}): {_AGAIN}"
            )
        read_given(path, layout.given.digests)

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
        result, replaced = self.paths.result, self.paths.replaced
        self._check()
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
        remove_journal(self.paths.state)
        self._throw_away(self.paths.scratch, self.paths.replaced, *self._found(GROWING_NAME), *self._found(TRASH_NAME))
        folders.remove_file(self.paths.status)

    def discard(self, growing: GrowingResult) -> None:
        """Remove what a run has done, for it cannot be trusted."""
        self._check()
        self._restore()
        remove_journal(self.paths.state)
        self._throw_away(growing.path, self.paths.scratch)
        folders.remove_file(self.paths.status)

    def remove_leftovers(self) -> None:
        """Remove what writes that were killed have left in the folders of this run."""
        self._check()
        for folder in (*self._found(GROWING_NAME), self.paths.scratch, self.paths.state / "finished"):
            folders.remove_ours(folder, folders.LEFTOVERS, keep_folders=True)
        for path in self._found(_LEFT_BESIDE):
            if not _is_waiting(path):
                folders.remove_file(path)

    def _check(self) -> None:
        """Raise where the lock was lost, or the folder is not this user's own."""
        folders.require_own(self.paths.state)
        self.claim.check()

    def _restore(self) -> None:
        """Give a replaced result its name back, unless something has it."""
        if folders.is_folder(self.paths.replaced):
            with suppress(FileExistsError):
                rename_new(self.paths.replaced, self.paths.result)
                sync(self.paths.result.parent)

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
        folders.remove_file(self.paths.certificate)
        folders.remove_file(self.paths.certificate_page)


def _is_waiting(path: Path) -> bool:
    """Whether this is the file by which a live process waits for the lock."""
    if not path.name.startswith("lock."):
        return False
    try:
        return lock_holder(path) is not None
    except IntegrityError:
        return False
    except OSError:  # nothing is known of it
        return True


def is_untidy(paths: ResultPaths) -> bool:
    """Whether a run was killed between its commit and its tidying up."""
    if paths.unfinished is not None:
        return False
    return any(map(folders.is_taken, (paths.state / HEADER, paths.scratch, paths.replaced, paths.status, paths.lock)))
