"""The command `oocattn`, and `python -m oocattn`."""

from __future__ import annotations

import gc

from oocattn.cli.main import main
from oocattn.cli.printing import keep_descriptors_taken, leave_quietly


def run() -> int:
    """Run the command with the process's arguments; return its exit code."""
    keep_descriptors_taken()
    try:
        return main()
    finally:
        leave_quietly()
        gc.freeze()  # else all that was imported is searched for garbage at the end: 0.3 s after PyTorch


if __name__ == "__main__":
    raise SystemExit(run())
