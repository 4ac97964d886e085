"""The command `oocattn`, and `python -m oocattn`."""

from __future__ import annotations

import gc
import os
import threading

from oocattn.cli.main import FAILED, main
from oocattn.cli.printing import keep_descriptors_taken, leave_quietly

LEAVE_SECONDS = 15.0
"""Seconds after which a command that has ended leaves, whatever threads of libraries Python waits for: they may hang."""


def run() -> int:
    """Run the command with the process's arguments; return its exit code."""
    keep_descriptors_taken()
    code = FAILED
    try:
        code = main()
        return code
    finally:
        leave_quietly()
        if threading.active_count() > 1:
            leaving = threading.Timer(LEAVE_SECONDS, os._exit, [code])
            leaving.daemon = True
            leaving.start()
        gc.freeze()  # else all that was imported is searched for garbage at the end: 0.3 s after PyTorch


if __name__ == "__main__":
    raise SystemExit(run())
