"""Renaming that never replaces what has the name already.

That is one step of the file system where it can (renameat2, Linux 3.15). Where it cannot, a name is claimed first, by
what fails in one step if something has it: a hard link, a new empty file, or for a folder its own renaming.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from oocattn.storage.files.folders import is_taken
from oocattn.storage.files.operations import UNSUPPORTED, name_failure

_HERE, _NO_REPLACE = -100, 1  # AT_FDCWD and RENAME_NOREPLACE of renameat2(2)

_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, *UNSUPPORTED})
"""What a file system answers that has no hard links, or no more of them."""


def rename_new(source: Path, target: Path) -> None:
    """Give a file or folder the name `target`, on the same file system.

    Raises FileExistsError where something has it. Where renameat2 is missing, a folder replaces an empty folder.
    """
    with name_failure(f"rename {source} to", target):
        try:
            _rename_no_replace(source, target)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if is_taken(target):
                raise _exists_error(target) from None
            (_rename_folder if source.is_dir() else _rename_file)(source, target)


def _rename_no_replace(source: Path, target: Path) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), _NO_REPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def _rename_folder(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # something has appeared there
            raise _exists_error(target) from None
        raise


def _rename_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        os.rename(source, target)
    else:
        os.unlink(source)


def _exists_error(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
