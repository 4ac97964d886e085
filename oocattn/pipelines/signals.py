"""Signals while a run is under way: held back until what is in flight is on disk, and then delivered.

Python raises KeyboardInterrupt wherever the main thread is, also within a library's bookkeeping. So a run takes the first
signal only as a word to its driver, which stops at its next step; a second one goes where it would have gone at once.

SIGUSR1 is Slurm's warning that time is short (`sbatch --signal=USR1@120`). It ends a run as a time limit does, with
TimeLimitError, because its default action would only kill the process; and a second one changes nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any

from oocattn.errors import TimeLimitError
from oocattn.storage.remote.limits import current_limit

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class InterruptedRunError(BaseException):
    """Raised within a driver that was told to stop; `Interrupts` puts the signal in its place.

    A handler of SIGUSR1 may raise it, too: where the run has finished meanwhile, `Interrupts` drops it.
    """


class Interrupts:
    """As a context manager, holds the first signal back and calls `tell`; at the end the signal is delivered.

    Only the main thread gets signals: elsewhere this does nothing. `tell` may be exchanged; it is called by the signal's
    handler, so it may do no more than put something in a `queue.SimpleQueue`.
    """

    held = 0
    """How many runs of this process hold a signal back and are about to end."""

    def __init__(self) -> None:
        self.tell: Callable[[], object] = lambda: None
        self._before: dict[int, Any] = {}
        self._signal: int | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: not Python's. Ignored: as a shell has it for what runs in the background.
            self._before = {number: found for number, found in handlers.items() if found not in (None, signal.SIG_IGN)}
            for number in self._before:
                signal.signal(number, self._handle)
            _active.append(self)
        return self

    @property
    def asked(self) -> bool:
        """Whether a signal is held back."""
        return self._signal is not None

    def check(self, seconds_left: float, words: str) -> None:
        """Raise what ends a run that waits, with these words: a signal that is held back, or that no time is left."""
        if self.asked:
            raise InterruptedRunError(f"interrupted{words}")
        if seconds_left <= 0:
            raise TimeLimitError(f"time limit reached{words}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            current_limit().stop()
            Interrupts.held += 1
            self.tell()
        elif number != signal.SIGUSR1:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self in _active:
            _active.remove(self)
        if self._signal is None:
            return
        Interrupts.held -= 1
        stopped = isinstance(error, InterruptedRunError)
        if error is None or stopped:
            self._deliver(self._signal, stopped)
        if stopped and self._signal == signal.SIGUSR1:
            raise TimeLimitError("time limit reached (SIGUSR1): what was in flight is on disk") from None
        if stopped:  # where its handler only went on
            raise KeyboardInterrupt from None

    def _deliver(self, number: int, stopped: bool) -> None:
        """Give the signal to the handler that was there before; a finished run is not stopped by it any more."""
        if number == signal.SIGUSR1 and self._before[number] is signal.SIG_DFL:
            return
        with nullcontext() if stopped else suppress(InterruptedRunError):
            signal.raise_signal(number)


_active: list[Interrupts] = []


def _let_go() -> None:
    """In a fork of a process with runs: they go on there alone, so signals do here what they did before."""
    Interrupts.held = 0
    for interrupts in reversed(_active):
        interrupts._restore()
        interrupts._signal = None
    _active.clear()


os.register_at_fork(after_in_child=_let_go)
