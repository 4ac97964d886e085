"""Our own folders: opened without following links, cleared by file name.

What is ours is told by names: a set of patterns of paths relative to a folder. A file that somebody else put there is
never removed, nor is anything behind a symbolic link.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from oocattn.errors import IntegrityError, ResultExistsError
from oocattn.storage.files.operations import name_failure

_TEMPORARY = r"(\.[0-9a-f]{32})?(\.partial)?"  # what the name of a file ends with while it is written
CHECKPOINTS = (r"(partial|sums)-\d+-\d+-\d+" + _TEMPORARY,)
JOURNAL = (r"\d+-\d+\.json" + _TEMPORARY,)

LEFTOVERS = (r"([^/]+/)*[^/]+\.[0-9a-f]{32}\.partial",)
"""What a write that was killed has left."""

GROUP = (
    r"([^/]+/)*(zarr\.json|\.zgroup|\.zarray|\.zattrs|\.zmetadata)" + _TEMPORARY,
    r"([^/]+/)*c([./]\d+)*" + _TEMPORARY,  # chunks of Zarr v3, and of a scalar
    r"([^/]+/)*\d+([./]\d+)*" + _TEMPORARY,  # chunks of Zarr v2
    *LEFTOVERS,
)
"""The files of a Zarr group: its metadata and chunks, and what a write that was killed has left of them."""

UNKNOWN_DISK = 1 << 60
"""Free bytes of a file system that does not say how many it has, as some in user space do."""

_HELD = re.compile(r"\.(nfs|fuse_hidden)[0-9a-f]+")
"""The name that a network file system gives a file of ours that was removed while it was open: gone when that is closed."""


@contextmanager
def open_folder(path: Path, *, listed: bool = True) -> Iterator[int]:
    """Open a folder, which must be readable if it is to be `listed`; yield its descriptor.

    Raises IntegrityError for a link or a file, OSError as `open`.
    """
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with name_failure("open the folder", path):
        try:
            descriptor = os.open(path, flags | os.O_RDONLY)
        except NotADirectoryError:
            found = "a symbolic link" if path.is_symlink() else "a file"
            raise IntegrityError(f"{path} is not a folder but {found}: expected a folder; remove it") from None
        except OSError as error:
            if listed or error.errno not in (errno.EACCES, errno.EISDIR):
                raise
            descriptor = os.open(path, flags | os.O_PATH)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def status_of(path: Path) -> os.stat_result | None:
    """The status of what is at a path, not following links; None where nothing is. Raises OSError where that is unknown."""
    try:
        with name_failure("look at", path):
            return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_folder(path: Path) -> bool:
    """Whether there is a folder, and no link to one."""
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_taken(path: Path) -> bool:
    """Whether anything is at a path, even a dangling link."""
    return status_of(path) is not None


def require_own(path: Path) -> None:
    """Raise IntegrityError unless `path` is a folder of this process's user.

    Some file systems have users of their own (NFS that squashes them, SMB, sshfs): there it must be of the user that
    they give what this process makes.
    """
    with open_folder(path, listed=False) as descriptor, name_failure("look at", path):
        owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid() and owner != _owner_of_new_files(path.parent):
        raise IntegrityError(
            f"{path} belongs to user {owner}: expected a folder of user {os.geteuid()}, who runs this; remove it, or choose "
            "another path"
        )


def _owner_of_new_files(folder: Path) -> int | None:
    """The owner of files that this process makes in a folder, or None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as made:
            return os.fstat(made.fileno()).st_uid
    except OSError:
        return None


def names_in(path: Path) -> list[str]:
    """List the names in a folder, sorted; none where there is no folder. Raises IntegrityError for a link."""
    try:
        with open_folder(path) as descriptor, name_failure("list", path):
            return sorted(os.listdir(descriptor))
    except FileNotFoundError:
        return []


def bytes_in(path: Path) -> int:
    """The bytes of the regular files in a folder; 0 where it cannot be read, or is not there."""
    found = 0
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # it was removed in between
                status = entry.stat(follow_symlinks=False)
                found += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return found


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    with name_failure("look at", folder):
        while not folder.exists():
            folder = folder.parent
    return folder


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or will be; `UNKNOWN_DISK` where the file system says none."""
    folder = existing(folder)
    try:
        return shutil.disk_usage(folder).free or UNKNOWN_DISK
    except OSError:
        return UNKNOWN_DISK


def pattern_of(ours: Sequence[str]) -> re.Pattern[str]:
    """What the paths of our own files match in full."""
    return re.compile("|".join(f"({each})" for each in ours))


def find_foreign(folder: Path, ours: Sequence[str]) -> Path | None:
    """Find a file below a folder that is not ours; None where all are. Ours are regular and match a pattern of `ours`."""
    if not is_taken(folder):
        return None
    if not is_folder(folder):
        return folder
    pattern = pattern_of(ours)
    for inside, modes, _ in _walk(folder):
        for name, mode in modes.items():
            is_ours = stat.S_ISREG(mode) and (pattern.fullmatch((inside / name).as_posix()) or _HELD.fullmatch(name))
            if not (is_ours or stat.S_ISDIR(mode)):
                return folder / inside / name
    return None


def refuse_foreign(folder: Path, ours: Sequence[str]) -> None:
    """Raise ResultExistsError where a folder to be removed holds foreign files."""
    foreign = find_foreign(folder, ours)
    if foreign is not None:
        raise ResultExistsError(
            f"{foreign} lies in {folder}, which would be removed, and is not a file that oocattn writes there: move it away"
        )


def remove_ours(folder: Path, ours: Sequence[str], *, keep_folders: bool = False) -> bool:
    """Remove our files below a folder, then its empty folders unless kept.

    Ours are regular files that match one of the patterns `ours`. Return whether nothing is left. Links are left alone.
    """
    if not is_folder(folder):
        return not is_taken(folder)
    pattern = pattern_of(ours)
    for inside, modes, descriptor in _walk(folder):
        for name, mode in modes.items():
            if stat.S_ISREG(mode) and pattern.fullmatch((inside / name).as_posix()):
                with suppress(FileNotFoundError), name_failure("remove", folder / inside / name):
                    os.unlink(name, dir_fd=descriptor)
        if not keep_folders:
            with suppress(OSError):  # a file that is not ours is left in it
                os.rmdir(folder / inside)
    return not is_taken(folder)


def _walk(folder: Path, inside: Path = Path(), parent: int | None = None) -> Iterator[tuple[Path, dict[str, int], int]]:
    """Walk a folder bottom-up without following links: relative path, modes by name, descriptor.

    (`os.fwalk` tells links by comparing inodes, which not every file system has for good.)
    """
    with name_failure("list", folder / inside):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder if parent is None else inside.name, flags, dir_fd=parent)
    try:
        modes = {}
        with name_failure("list", folder / inside):
            for name in sorted(os.listdir(descriptor)):
                with suppress(FileNotFoundError):  # it was removed in between
                    modes[name] = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
        for name, mode in modes.items():
            if stat.S_ISDIR(mode):
                yield from _walk(folder, inside / name, descriptor)
        yield inside, modes, descriptor
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file of our own, if it is there."""
    with suppress(FileNotFoundError), name_failure("remove", path):
        path.unlink()
