"""The command `oocattn`, and `python -m oocattn`."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading

from oocattn.cli.printing import keep_descriptors_taken, leave_quietly

LEAVE_SECONDS = 15.0
"""Seconds after which a command that has ended leaves, whatever threads of libraries Python waits for: they may hang."""


def run() -> int:
    """Run the command with the process's arguments; return its exit code."""
    keep_descriptors_taken()
    code = 1
    try:
        from oocattn.cli.main import main  # on a busy machine it takes seconds, in which Ctrl-C may come

        code = main()
    except KeyboardInterrupt:  # before `main` has taken signals into its hands
        code = 128 + signal.SIGINT
        print("oocattn: interrupted", file=sys.stderr)
    finally:
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # the command has ended, and says how by its exit code
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        leave_quietly()
        if threading.active_count() > 1:
            leaving = threading.Timer(LEAVE_SECONDS, os._exit, [code])
            leaving.daemon = True
            leaving.start()
        gc.freeze()  # else all that was imported is searched for garbage at the end: 0.3 s after PyTorch
    return code


if __name__ == "__main__":
    raise SystemExit(run())
