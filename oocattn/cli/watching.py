"""`oocattn status --watch`: the status of a run, drawn again in place until the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from oocattn.pipelines.watch.status import Status

LOOKING_SECONDS, LOOKING_SECONDS_ELSEWHERE = 1.0, 5.0  # between two looks at a result here, and at one behind a URL


def watch(look: Callable[[], Status], seconds: float) -> Status:
    """Draw the status every so many seconds while the run is alive; return the last one, which is drawn too.

    On what is no terminal the last one alone is printed. It ends as well where nobody reads it any more.
    """
    console = Console(file=sys.stdout, highlight=False)
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            status = look()
            live.update(Text(str(status)), refresh=console.is_terminal)
            if status.state != "running" or getattr(sys.stdout, "lost", None) is not None:
                return status
            time.sleep(seconds)
