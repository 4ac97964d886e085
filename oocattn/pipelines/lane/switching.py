"""The interval at which threads take turns, while there is a lane on a GPU."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable

SWITCH_SECONDS = 5e-4
"""Seconds between switches of threads while there is a lane on a GPU.

The thread that launches needs its turn before the device runs dry. (1M tokens x 8 heads: the gaps fell from 53 to 22
ms.)
"""

_lock = threading.RLock()  # a lane that nobody closed may end its hold wherever Python collects garbage
_holds, _found, _set = 0, 0.0, 0.0


def hold_short_interval(owner: object) -> Callable[[], object]:
    """Switch threads often until the returned function is called or the owner is gone.

    With the last hold the interval is put back as the first one found it, unless somebody else has set it since.
    """
    _add(1)
    return weakref.finalize(owner, _add, -1)


def _add(holds: int) -> None:
    global _holds, _found, _set
    with _lock:
        if not _holds:
            _found = sys.getswitchinterval()
            _set_interval(min(SWITCH_SECONDS, _found))
            _set = sys.getswitchinterval()
        _holds += holds
        if not _holds and sys.getswitchinterval() == _set:
            _set_interval(_found)


def _set_interval(seconds: float) -> None:
    """Set the switch interval exactly; Python cuts it to whole microseconds."""
    sys.setswitchinterval(seconds + 5e-7)
