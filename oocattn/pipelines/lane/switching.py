"""The interval at which threads take turns, while there is a lane on a GPU."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable

SWITCH_SECONDS = 5e-4
"""Seconds: the thread that launches needs its turn before the device runs dry (gaps of 22 ms, not 53)."""

_HALF = 5e-7  # Python cuts an interval to whole microseconds
_lock = threading.RLock()  # a lane that nobody closed may end its hold wherever Python collects garbage
_holds, _found, _set = 0, 0.0, 0.0


def hold_short_interval(owner: object) -> Callable[[], object]:
    """Switch threads often until the returned function is called or the owner is gone; the last one puts it back."""
    _add(1)
    return weakref.finalize(owner, _add, -1)


def _add(holds: int) -> None:
    global _holds, _found, _set
    with _lock:
        if not _holds:
            _found = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_SECONDS, _found) + _HALF)
            _set = sys.getswitchinterval()
        _holds += holds
        if not _holds and sys.getswitchinterval() == _set:  # else somebody else has set it since
            sys.setswitchinterval(_found + _HALF)
