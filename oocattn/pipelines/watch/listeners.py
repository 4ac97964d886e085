"""All that watches a run, behind one guard: no listener ends a run by failing."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

from oocattn.log import logger
from oocattn.pipelines.watch.events import Callback, Event


class Listeners:
    """A listener that passes every event on to others, in their order.

    One that raises an `Exception` is logged and called no more. `KeyboardInterrupt`, `SystemExit` and every other
    `BaseException` pass: so a listener ends a run that is to end.
    """

    def __init__(self, listeners: Iterable[Callback]) -> None:
        self._listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:
                self._listeners = [other for other in self._listeners if other is not listener]
                logger.warning(
                    "a listener failed; the run continues without it: %s raised %s: %s (%s)",
                    *(_name(listener), type(error).__name__, error, _place(error)),
                )


def _name(listener: Callback) -> str:
    return getattr(listener, "__qualname__", type(listener).__qualname__)


def _place(error: Exception) -> str:
    """File and line where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"
