"""Job state that is kept in a store as well, so that another machine can resume.

The folder of job state is this machine's copy. Each of its files that a later run needs is put into the store once it is on
disk here, and removed there once it is removed here. What is in the store is the truth: it replaces the copy when a run
begins under the lock. A file is whole or not there, and says itself what it is: so a kill between the two costs no more than
one on the disk does.

A worker on another machine has a folder of its own, through which its files only pass: any other may read them next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oocattn.storage.files.folders import CHECKPOINTS, GROUP, JOURNAL, is_folder, names_in, remove_file, remove_ours
from oocattn.storage.files.operations import name_failure
from oocattn.storage.remote.objects import Objects

HEADER = "plan.json"  # of the journal: without it, nothing else counts
LABEL_BYTES = 64 << 10  # of a partial: enough for what it says of itself

_PARTIAL = rf"partials/{CHECKPOINTS[0]}"
MIRRORED = re.compile(
    "|".join((re.escape(HEADER), r"(other-bits|attempts)\.json", rf"finished/{JOURNAL[0]}", _PARTIAL))
    + "".join(rf"|result-[0-9a-f]{{8}}\.zarr/({pattern})" for pattern in GROUP[:2])
)
"""The keys of job state. A server may list any other, with `..` in it."""


@dataclass(frozen=True)
class Mirror:
    """The folder of job state of a run, and the same in a store. It is small, and can be sent to workers.

    One that is `passing` keeps no file in the folder once it is in the store.
    """

    folder: Path
    objects: Objects
    passing: bool = False

    def push(self, path: Path) -> None:
        """Put a file of the folder, or all below one, into the store."""
        for file in sorted(path.rglob("*")) if is_folder(path) else [path]:
            if file.is_file() and MIRRORED.fullmatch(self._key(file)):
                self.objects.upload(self._key(file), file)
                if self.passing:
                    remove_file(file)

    @contextmanager
    def fetched(self, path: Path) -> Iterator[None]:
        """Have a file in the folder while inside, empty where the store has none, if it does not stay there anyway."""
        if not self.passing:
            yield
            return
        try:
            with name_failure("write", path):
                self.objects.download(self._key(path), path)
            yield
        finally:
            remove_file(path)

    def drop(self, path: Path) -> None:
        """Remove a file from the store."""
        self.objects.remove(self._key(path))

    def clear(self) -> None:
        """Remove the job state from the store, the header first."""
        for key in sorted(self._keys(), key=lambda key: key != HEADER):
            self.objects.remove(key)

    def wipe(self) -> None:
        """Remove the copy that is here, the header first."""
        remove_ours(self.folder, (re.escape(HEADER),), keep_folders=True)
        for name in names_in(self.folder):
            if is_folder(self.folder / name):
                remove_ours(self.folder / name, (*GROUP, *CHECKPOINTS, *JOURNAL))
        remove_ours(self.folder, (r"(other-bits|status|attempts)\.json",), keep_folders=True)

    def pull(self, *, whole: bool) -> None:
        """Have here what is in the store, and nothing else. Unless `whole`, partials say no more than what they are."""
        self.wipe()
        keys = sorted(self._keys(), key=lambda key: key == HEADER)
        if HEADER in keys:
            with name_failure("make", self.folder / "finished"):
                (self.folder / "finished").mkdir()
        for key in keys:
            path = self.folder / key
            with name_failure("make", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            if key.startswith("partials/"):
                self._pull_partial(key, whole=whole)
            else:
                self.objects.download(key, path)

    def refresh(self, *, whole: bool) -> None:
        """Have here the records and partials that workers elsewhere have put into the store; partials as `pull` has them."""
        found = [key for key in self._keys() if key.startswith(("finished/", "partials/"))]
        for name in ("finished", "partials"):
            for key in {f"{name}/{each}" for each in names_in(self.folder / name)} - set(found):
                if MIRRORED.fullmatch(key):
                    remove_file(self.folder / key)
        for key in found:
            path = self.folder / key
            if key.startswith("partials/"):
                self._pull_partial(key, whole=whole)
            elif not path.exists():
                self.objects.download(key, path)

    def begin_elsewhere(self, growing: str) -> None:
        """Make the folder of a worker that shares none: the metadata of the growing result of that name, nothing else."""
        for key in ("finished", "partials", *(key for key in self._keys() if key.startswith(f"{growing}/"))):
            path = self.folder / key
            with name_failure("make", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            if "/" in key:
                self.objects.download(key, path)
            else:
                path.mkdir()

    def _pull_partial(self, key: str, *, whole: bool) -> None:
        if whole:
            self.objects.download(key, self.folder / key)
        else:
            (self.folder / key).write_bytes(self.objects.read_start(key, LABEL_BYTES) or b"")

    def _keys(self) -> list[str]:
        return [key for key in self.objects.list() if MIRRORED.fullmatch(key)]

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
