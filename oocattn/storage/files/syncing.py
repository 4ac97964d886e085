"""fsync of files and folders, and its absence on some file systems.

Samba, some NFS servers and file systems in user space refuse to sync a folder, and a few a file. Nothing that was written
is lost by that as long as the system runs; a power cut may cost what was written last. So it is said once, and the run goes
on. Any other answer is an error: after EIO, what was written may be lost.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from oocattn.storage.files.operations import UNSUPPORTED, name_failure, warn_once

_NO_FOLDERS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF, *UNSUPPORTED})
"""What a file system answers that does not open a folder to sync it, or does not sync what is open."""


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to disk.

    Raises OSError as the file system does.
    """
    try:
        with name_failure("open", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FOLDERS and path.is_dir():
            _warn(path, os.stat(path), error)
            return
        raise
    try:
        sync_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int, path: Path) -> None:
    """As `sync`, of an open file or folder. `path` is what messages call it."""
    with name_failure("sync", path):
        status = os.fstat(descriptor)
        unsupported = _NO_FOLDERS if stat.S_ISDIR(status.st_mode) else UNSUPPORTED
        for function in (os.fsync, os.fdatasync):
            try:
                function(descriptor)
            except OSError as error:
                if error.errno not in unsupported:
                    raise
                refused = error
            else:
                break
        else:
            _warn(path, status, refused)


def _warn(path: Path, status: os.stat_result, error: OSError) -> None:
    """Say once for each file system that it does not sync."""
    is_folder = stat.S_ISDIR(status.st_mode)
    warn_once(
        status.st_dev,
        "sync",
        "%s: this file system does not sync %s (%s): a power cut may cost what was written last; after one, resume with "
        "--check-finished, and verify the result",
        *(path if is_folder else path.parent, "folders" if is_folder else "files", os.strerror(error.errno or 0)),
    )
