"""What a run does to its places: its growing result begins, is found again, takes its final name, or is removed.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError, ResultExistsError
from oocattn.storage.dtypes import numpy_dtype
from oocattn.storage.files.folders import (
    CHECKPOINTS,
    GROUP,
    JOURNAL,
    LEFTOVERS,
    find_foreign,
    is_folder,
    is_taken,
    names_in,
    refuse_foreign,
    remove_file,
    remove_ours,
    require_own,
)
from oocattn.storage.files.operations import doing
from oocattn.storage.files.renaming import rename_new
from oocattn.storage.files.syncing import sync
from oocattn.storage.journal.claims import Claim
from oocattn.storage.journal.journal import forget, has_begun
from oocattn.storage.journal.lock import lock_holder
from oocattn.storage.make.create import OwnStore, create_array, sync_metadata
from oocattn.storage.paths import ATTRIBUTES, GROWING_NAME, TRASH_NAME, ResultPaths, identity_at, recorded_attributes
from oocattn.storage.results.arrays import ResultArrays

_LEFT_BESIDE = re.compile(r"(lock|ready|(plan|status|report|other-bits)\.json)\.[0-9a-f]{32}\.partial")

_AGAIN = "begin again with overwrite=True (--overwrite)"

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Layout:
    """Shape [B, Hq, N, D] and dtype of `out`, the rows of its chunks, and what the result says that it is the answer to."""

    shape: tuple[int, int, int, int]
    dtype: str
    chunk_rows: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Growing:
    """A result that is not complete: where it grows, its arrays, and the identity of the result that it will replace."""

    path: Path
    arrays: ResultArrays
    replaces: str | None

    @property
    def name(self) -> str:
        """Its name in the folder of job state, which the journal keeps."""
        return self.path.name


@dataclass(frozen=True)
class RunState:
    """The places of a result, in the hands of the run that holds its lock."""

    paths: ResultPaths
    claim: Claim

    def begin(self, layout: Layout, *, overwrite: bool) -> Growing:
        """Make the empty result, `out` [B, Hq, N, D] and `lse` [B, Hq, N], in place of any that an unfinished run left.

        With `overwrite` it is to replace the result that is there now. Raises ProblemError where it could not be given its
        name later, and ResultExistsError where a file of somebody else's would be removed, now or then.
        """
        paths = self.paths
        self._check()
        with doing("look at", paths.state):
            elsewhere = paths.state.stat().st_dev != paths.result.parent.stat().st_dev
        if elsewhere:
            raise ProblemError(
                f"{paths.state} is on another file system than {paths.result.parent}: what grows there cannot be moved to "
                "its place; choose another path"
            )
        self._refuse_foreign()
        if overwrite:
            refuse_foreign(paths.result, GROUP)
        forget(paths.state)
        self._restore()
        if not overwrite and is_taken(paths.result):
            raise ResultExistsError(f"{paths.result} exists: choose another path, or replace it (--overwrite)")
        # A result that could not be restored was replaced, by a run that was killed before it removed it.
        self._throw_away(*self._growing(), paths.scratch, paths.replaced)
        remove_file(paths.status)
        if not is_taken(paths.result):
            self._forget_certificate()  # else it is of the result that is there until the commit
        with doing("make", paths.scratch):
            paths.scratch.mkdir()
        growing = paths.state / f"result-{uuid.uuid4().hex[:8]}.zarr"
        with doing("make", growing):
            group = zarr.create_group(OwnStore(growing), attributes={ATTRIBUTES: dict(layout.attributes)}, zarr_format=3)
            out = create_array(group, "out", layout.shape, layout.dtype, layout.chunk_rows)
            arrays = ResultArrays(out, create_array(group, "lse", layout.shape[:3], "float32", layout.chunk_rows))
        sync_metadata(growing)
        return Growing(growing, arrays, identity_at(paths.result))

    def resume(self, path: Path, layout: Layout, *, replaces: str | None) -> Growing:
        """The result that has begun to grow at `path`, to be written on.

        Raises IntegrityError where it is not what `begin` made of the same layout, or a folder in it is a link.
        """
        self._check()
        with suppress(FileExistsError), doing("make", self.paths.scratch):
            self.paths.scratch.mkdir()
        for folder in (path, path / "out", path / "lse", self.paths.scratch, self.paths.state / "finished"):
            if not is_folder(folder):
                raise IntegrityError(f"{folder} is not a folder: the unfinished run is damaged: {_AGAIN}")
        arrays = ResultArrays.of(LocalStore(path))
        found = {name: (array.shape, array.dtype, array.chunks) for name, array in arrays.by_name.items()}
        out, lse = (1, 1, layout.chunk_rows, layout.shape[3]), (1, 1, layout.chunk_rows)
        float32 = np.dtype(np.float32)
        expected = {"out": (layout.shape, numpy_dtype(layout.dtype), out), "lse": (layout.shape[:3], float32, lse)}
        recorded = recorded_attributes(path)
        differing = [name for name in expected if found[name] != expected[name]]
        differing += [name for name, value in layout.attributes.items() if recorded.get(name) != value]
        if differing:
            raise IntegrityError(
                f"{path}: the metadata of the unfinished result is damaged ({', '.join(differing)}): {_AGAIN}"
            )
        return Growing(path, arrays, replaces)

    # The commit, under the lock. It can be repeated from any step at which it failed.
    #   1. Ask whether the lock is still this run's.
    #   2. Where something is at the result's path that was not there when the run began, refuse.
    #   3. Where the result that is to be replaced is there, give it another name in the folder of job state.
    #   4. Give the complete result its name, unless something has it by now, and sync the folder.
    def commit(self, growing: Growing) -> None:
        """Give the complete result its name. Raises ResultExistsError where something is there that the run may not replace,
        LockedError where the lock was lost, and OSError as the file system does."""
        result, replaced = self.paths.result, self.paths.replaced
        self._check()
        if is_folder(growing.path):
            found = identity_at(result)
            if found is not None:
                if found != growing.replaces:
                    raise self._appeared()
                refuse_foreign(result, GROUP)
                rename_new(result, replaced)
                if identity_at(replaced) != found:  # exchanged between two looks
                    rename_new(replaced, result)
                    raise self._appeared()
            self._forget_certificate()  # of the result that was replaced
            try:
                rename_new(growing.path, result)
            except FileExistsError:
                raise self._appeared() from None
        sync(result.parent)

    def _appeared(self) -> ResultExistsError:
        return ResultExistsError(
            f"{self.paths.result} has appeared, or was replaced, while the run was under way: move it away and resume"
        )

    def tidy(self) -> None:
        """Remove what a run whose result is complete needs no more: all but the report and a certificate."""
        self._check()
        forget(self.paths.state)
        self._throw_away(self.paths.scratch, self.paths.replaced, *self._growing(), *self._trash())
        remove_file(self.paths.status)

    def discard(self, growing: Growing) -> None:
        """Remove what a run has done, for it cannot be trusted."""
        self._check()
        self._restore()
        forget(self.paths.state)
        self._throw_away(growing.path, self.paths.scratch)
        remove_file(self.paths.status)

    def remove_leftovers(self) -> None:
        """Remove what writes that were killed have left in the folders of this run."""
        self._check()
        for folder in (*self._growing(), self.paths.scratch, self.paths.state / "finished"):
            remove_ours(folder, LEFTOVERS, keep_folders=True)
        for name in names_in(self.paths.state):
            if _LEFT_BESIDE.fullmatch(name) and not _is_waiting(self.paths.state / name):
                remove_file(self.paths.state / name)

    def _check(self) -> None:
        """Raise LockedError where the lock was lost, IntegrityError where the folder is not this user's own any more."""
        require_own(self.paths.state)
        self.claim.check()

    def _restore(self) -> None:
        """Give a result its name back that was to be replaced when a run was killed, where nothing took its place."""
        if is_folder(self.paths.replaced):
            with suppress(FileExistsError):
                rename_new(self.paths.replaced, self.paths.result)
                sync(self.paths.result.parent)

    def _refuse_foreign(self) -> None:
        """Raise ResultExistsError where a folder that is to be removed holds a file that no run writes there."""
        refuse_foreign(self.paths.scratch, CHECKPOINTS)
        refuse_foreign(self.paths.state / "finished", JOURNAL)
        for folder in (*self._growing(), self.paths.replaced):
            refuse_foreign(folder, GROUP)

    def _growing(self) -> list[Path]:
        return [self.paths.state / name for name in names_in(self.paths.state) if GROWING_NAME.fullmatch(name)]

    def _trash(self) -> list[Path]:
        return [self.paths.state / name for name in names_in(self.paths.state) if TRASH_NAME.fullmatch(name)]

    def _throw_away(self, *folders: Path) -> None:
        """Remove folders; first their names, so that whoever still writes there finds them no more."""
        for folder in folders:
            if is_folder(folder) and not TRASH_NAME.fullmatch(folder.name):
                with doing("rename", folder):
                    os.rename(folder, self.paths.state / f"trash-{uuid.uuid4().hex[:8]}")
        for trash in self._trash():
            if not remove_ours(trash, (*GROUP, *CHECKPOINTS, *JOURNAL)):
                logger.warning("%s holds files that oocattn did not write, and is left", find_foreign(trash, GROUP) or trash)

    def _forget_certificate(self) -> None:
        for path in (self.paths.certificate, self.paths.certificate_page):
            remove_file(path)


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
    """Whether a run was killed after it had committed its result and before it had tidied up."""
    if paths.unfinished is not None:
        return False
    leftovers = (paths.scratch, paths.replaced, paths.status, paths.lock)
    return has_begun(paths.state) or any(map(is_taken, leftovers))
