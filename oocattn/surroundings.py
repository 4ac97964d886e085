"""What libraries expect of a process as they are imported, and a process may lack: a home folder, a current folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def with_some_home() -> Iterator[None]:
    """Within, a user without a home folder, as in a container, has an empty one: bokeh cannot be imported otherwise."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = os.devnull
        try:
            yield
        finally:
            del os.environ["HOME"]
    else:
        yield


@contextmanager
def in_some_folder() -> Iterator[None]:
    """Within, a process whose current folder was removed is in another one, or MKL would end it as torch is imported."""
    try:
        os.getcwd()
    except FileNotFoundError:
        removed = os.open(".", os.O_RDONLY)
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(removed)
            os.close(removed)
    else:
        yield
