"""Signals to the `oocattn` command."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from oocattn.pipelines.signals import SIGNALS, InterruptedRunError, Interrupts


class Signals:
    """Signals where no run holds them back: the first one ends the command, the second one the process, at once."""

    received = 0

    def __enter__(self) -> Signals:
        in_charge = threading.current_thread() is threading.main_thread()
        found = {number: signal.getsignal(number) for number in SIGNALS if in_charge}
        # None: not Python's. Ignored: as nohup has it, and a shell for what runs in the background.
        self._before = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            if not self.received:
                self.received = number
                raise InterruptedRunError
            return
        if self.received or Interrupts.held:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        raise KeyboardInterrupt
