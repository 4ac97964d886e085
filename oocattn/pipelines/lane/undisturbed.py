"""What would hold up the threads that launch, and is held off while there is a lane on a GPU.

Other threads have short turns, and Python searches only what is made meanwhile for cyclic garbage. Each search stops all
threads: with PyTorch, Dask and bokeh imported, one of everything takes 0.10 to 0.19 s (a machine with H200s, Python 3.12),
once as a run starts, and again every few seconds.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable

SWITCH_SECONDS = 5e-4
"""Seconds: the thread that launches needs its turn before the device runs dry (gaps of 22 ms, not 53)."""

FROZEN_BY_PYTHON = 4096
"""Objects that may be frozen without a caller's doing: some hundreds in Python 3.12, from its start."""

_HALF = 5e-7  # Python cuts an interval to whole microseconds
_lock = threading.RLock()  # a lane that nobody closed may end its hold wherever Python collects garbage
_holds, _found, _set, _frozen = 0, 0.0, 0.0, 0


def hold_undisturbed(owner: object) -> Callable[[], object]:
    """Keep threads undisturbed until the returned function is called or the owner is gone; the last one puts all back."""
    _add(1)
    return weakref.finalize(owner, _add, -1)


def _add(holds: int) -> None:
    global _holds
    with _lock:
        if not _holds:
            _begin()
        _holds += holds
        if not _holds:
            _end()


def _begin() -> None:
    global _found, _set, _frozen
    _found = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH_SECONDS, _found) + _HALF)
    _set = sys.getswitchinterval()
    _frozen = 0
    if gc.get_freeze_count() < FROZEN_BY_PYTHON:  # else it is the caller's, who would not have it back as it was
        gc.freeze()
        _frozen = gc.get_freeze_count()


def _end() -> None:
    if sys.getswitchinterval() == _set:  # else somebody else has set it since
        sys.setswitchinterval(_found + _HALF)
    if gc.get_freeze_count() <= _frozen:  # else somebody else has frozen more since
        gc.unfreeze()
