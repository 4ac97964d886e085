"""The filters of warnings, which all threads of a process share, changed by one thread at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from oocattn.threads import ProcessLock

_changing = ProcessLock()  # a thread may open one array while it opens another


@contextmanager
def no_warnings() -> Iterator[None]:
    """Have no warning shown for a moment, and leave the filters as they were found.

    Where two threads change and restore them by turns (1 changes, 2 changes, 1 restores, 2 restores), the change of thread
    1 stays. What is done here must be short: other threads wait.
    """
    with _changing.held(), warnings.catch_warnings(action="ignore"):
        yield
