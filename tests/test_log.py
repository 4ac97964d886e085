"""The log of the package: one line a message, and a handler that fails ends nothing."""

from __future__ import annotations

import io
import logging
import sys

import pytest

import oocattn  # noqa: F401 - which sets the logger up

LOGGER = logging.getLogger("oocattn")


def test_a_message_is_one_line_without_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    LOGGER.warning("%s: %d of %.1f", "a\x1b[31m\nINFO forged", 3, 0.25)
    assert caplog.records[0].getMessage() == r"a\x1b[31m\nINFO forged: 3 of 0.2"


def test_a_handler_that_raises_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(28, "No space left on device")

    broken = Broken()
    LOGGER.addHandler(broken)
    try:
        LOGGER.warning("something happened")
    finally:
        LOGGER.removeHandler(broken)


def test_a_standard_error_that_was_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    handler = logging.StreamHandler(closed)
    LOGGER.addHandler(handler)
    try:
        LOGGER.warning("something happened")
    finally:
        LOGGER.removeHandler(handler)
