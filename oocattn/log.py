"""The package's logger: messages fit to print, handlers that may fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from oocattn.text import printable


class _Logger(logging.Logger):
    """A logger that loses lines where they cannot be written, but never ends a run."""

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context in which a message is handled: a progress bar makes way for it."""

    def handle(self, record: logging.LogRecord) -> None:
        """Pass the record on, on one line, control characters escaped, numbers kept."""
        try:
            record.msg = printable(record.msg)
            if isinstance(record.args, tuple):
                record.args = tuple(each if isinstance(each, int | float) else printable(each) for each in record.args)
            with self.around():
                super().handle(record)
        except Exception:  # a handler's, such as ValueError of a standard error that was closed: nowhere is left to say it
            pass


_logger = logging.getLogger("oocattn")
_logger.__class__ = _Logger  # also where the application asked for the logger first
logger = cast(_Logger, _logger)
