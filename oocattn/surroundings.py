"""What libraries expect of a process as they are imported, and a process may lack: a home folder, a current folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def with_some_home() -> Iterator[None]:
    """Within, a user who has no home folder, as in a container whose user is only a number, has one without any file.

    bokeh looks for its settings there as it is imported, and cannot be imported otherwise.
    """
    try:
        Path.home()
        missing = False
    except RuntimeError:
        missing = True
    if missing:
        os.environ["HOME"] = os.devnull
    try:
        yield
    finally:
        if missing:
            del os.environ["HOME"]


@contextmanager
def in_some_folder() -> Iterator[None]:
    """Within, a process whose current folder was removed is in another one.

    Intel's MKL asks for it as torch is imported, and ends the process where there is none.
    """
    try:
        os.getcwd()
        removed = None
    except FileNotFoundError:
        removed = os.open(".", os.O_RDONLY)
        os.chdir("/")
    try:
        yield
    finally:
        if removed is not None:
            os.fchdir(removed)
            os.close(removed)
