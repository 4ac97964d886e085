"""A result in a store, from the first look at its place to its publication.

Its metadata and the arrays that it was given grow in the folder of job state, its chunks in the store. A mark beside the
result says whose those are: nothing is removed but what this run, or an earlier one from the same folder, has put there, and
with `overwrite` what another run of oocattn has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from oocattn.errors import ResultExistsError
from oocattn.naming import named, setting
from oocattn.problem.given import DTYPES
from oocattn.storage.files.folders import is_taken, remove_file
from oocattn.storage.files.regular import read_file
from oocattn.storage.journal.claims import Claim
from oocattn.storage.journal.store_lock import LOCK_KEY
from oocattn.storage.nodes import MOST_BYTES
from oocattn.storage.paths import ATTEMPTS, ResultPaths
from oocattn.storage.remote.mirror import MIRRORED
from oocattn.storage.results.added import NAMES as ADDED
from oocattn.storage.results.chunk_objects import ChunkObjects
from oocattn.storage.results.marks import MARK, describe_mark, is_from_here, make_mark, read_mark
from oocattn.storage.results.stored import NODES, StoredResult

_METADATA = "zarr.json"

_ARRAYS = "|".join(("out", "lse", *DTYPES, *ADDED))
_OURS = re.compile(rf"zarr\.json|({_ARRAYS})/(zarr\.json|c(/\d+)*)")
"""The keys of a result."""

LEFT_BESIDE = re.compile(rf"{re.escape(MARK)}|{LOCK_KEY.pattern}|scratch/({MIRRORED.pattern})")
"""The keys beside a result that are there while its run is not over."""


@dataclass(frozen=True)
class Publication:
    """A result in a store, in the hands of the run that holds its lock."""

    paths: ResultPaths
    stored: StoredResult

    def refuse(self, *, overwrite: bool) -> list[str]:
        """Raise ResultExistsError where something is there that a new run may not remove; return the keys of the rest."""
        keys, objects = self.stored.objects.list(), self.stored.objects
        foreign = next((key for key in keys if not _OURS.fullmatch(key)), None)
        if foreign is not None:
            raise ResultExistsError(f"{objects}/{foreign} is there, and oocattn did not write it: choose another place")
        taken = any(key in NODES for key in keys)
        if taken and not overwrite:
            raise ResultExistsError(
                f"{objects} exists: choose another place, or replace it with {setting('overwrite', True)}"
            )
        mark = read_mark(self.paths)
        if keys and not taken and mark is None:
            raise ResultExistsError(f"{objects}/{keys[0]} is there, and no run says that it wrote it: choose another place")
        if mark is not None and not overwrite and not is_from_here(self.paths, mark):
            raise ResultExistsError(
                f"{objects}: an unfinished run to it has its job state {describe_mark(mark)}: resume it there, or begin "
                f"again with {setting('overwrite', True)}"
            )
        return keys

    def begin(self, growing: Path, keys: Sequence[str]) -> None:
        """Remove what is there, the `keys` that `refuse` let pass, and mark the place as that of a run."""
        make_mark(self.paths, growing.name)
        if _METADATA in keys:
            self.stored.objects.remove(_METADATA)  # half a result is never seen
        self.stored.objects.remove_each(key for key in keys if key != _METADATA)
        self._write_arrays(growing)

    def resume(self, growing: Path) -> None:
        """Have the place ready for more to be written. Raises ResultExistsError where another run has begun there."""
        mark = read_mark(self.paths)
        if mark is None or mark.result != growing.name:
            now = "" if mark is None else f" by one with its job state {describe_mark(mark)}"
            raise ResultExistsError(
                f"{self.stored} is not the place of the unfinished run in {self.paths.state}: that is to another one, or "
                f"was replaced{now}; begin again with {setting('overwrite', True)}, or with another {named('scratch')}"
            )
        self._write_arrays(growing)

    def _write_arrays(self, growing: Path) -> None:
        """Write the metadata of arrays, to a store that takes no chunk without."""
        if self.stored.needs_arrays_first:
            self._write_each(growing, [key for key in _files_in(growing) if key.endswith(f"/{_METADATA}")])

    def commit(self, growing: Path) -> None:
        """Write what is in the growing folder, the group's metadata last. Raises ResultExistsError where one is there."""
        *others, last = _files_in(growing)
        content = _content(growing, last)
        found = self.stored.read(last)
        if found is None:
            self._write_each(growing, others)
            if self.paths.lock_kind == "none":
                self.stored.objects.write(last, content)
            elif not self.stored.objects.create(last, content):
                found = self.stored.read(last)
        if found is not None and found != content:
            raise ResultExistsError(f"{self.stored} has appeared while the run was under way: move it away and resume")

    def tidy(self) -> None:
        """Remove the mark of a complete result."""
        self.paths.forget(MARK)

    def keep_attempts(self) -> None:
        """Have the attempts at a complete result beside it, and not in the folder of job state."""
        path, beside = self.paths.state / ATTEMPTS, self.paths.beside
        if beside is not None and is_taken(path):
            beside.write(ATTEMPTS, read_file(path, MOST_BYTES, follow=False))
            remove_file(path)

    def discard(self) -> None:
        """Remove what the run has written."""
        self._remove_ours()
        self.paths.forget(MARK)

    def _remove_ours(self) -> None:
        """Remove the objects of a result; what others have put between them meanwhile stays."""
        self.stored.objects.remove_each(filter(_OURS.fullmatch, self.stored.objects.list()))

    def _write_each(self, growing: Path, keys: Iterable[str]) -> None:
        self.stored.objects.write_each({key: _content(growing, key) for key in keys})


def _files_in(growing: Path) -> list[str]:
    """The files in a growing folder, relative to it: the group's metadata is the last, and before it those of arrays."""
    found = [str((Path(folder) / name).relative_to(growing)) for folder, _, names in os.walk(growing) for name in names]
    return sorted(found, key=lambda key: (key == _METADATA, key.endswith(_METADATA), key))


def _content(growing: Path, key: str) -> bytes:
    return read_file(growing / key, MOST_BYTES, follow=False)


def chunks_of(paths: ResultPaths, claim: Claim | None) -> ChunkObjects | None:
    """Where the chunks of a growing result are, written under a claim; None for files."""
    return None if paths.stored is None else ChunkObjects(paths.stored, None if paths.lock_kind == "none" else claim)
