"""Memory maps of files; what cannot be mapped is read.

Gluster, mergerfs and others in user space refuse maps (ENODEV), a limit on address space or on open files does (ENOMEM,
EMFILE), and a file that has become shorter has nothing to map. None of that says anything about the bytes of the file.
"""

from __future__ import annotations

import mmap


def map_file(descriptor: int, length: int, offset: int = 0) -> mmap.mmap | None:
    """Map `length` bytes from `offset`, read-only; None where that fails.

    `offset` is a multiple of a page.
    """
    try:
        return mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=offset)
    except (OSError, ValueError):
        return None
