"""Standard output and error of the command: they take whatever is printed, also where nobody reads it any more.

A reader that left (`oocattn run ... | head`), a full disk, a stream that was closed (`>&-`) or a character that the
terminal's encoding lacks must not end a run. What could not be printed is dropped, and `Printing.lost` says why.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class _Stream:
    """A text stream in the place of another one, which may fail or be missing: then what is written is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: Exception | None = None if stream is not None else ValueError("it is closed")
        self._bar = False  # the line is that of a progress bar

    def write(self, text: str) -> int:
        """Write the text, with escapes such as `\\xe9` for characters that the stream's encoding lacks.

        What is no progress bar begins on a line of its own.
        """
        if self._bar and text and text[0] not in "\r\n":
            self._write("\n")
        if text:
            self._bar = text[0] == "\r" and not text.isspace() and "\n" not in text
        self._write(text)
        return len(text)

    def _write(self, text: str) -> None:
        if self._stream is not None and self.lost is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except Exception as error:  # of any kind: the caller's own stream may be in its place
                self.lost = error

    def flush(self) -> None:
        """Have what was written leave this process."""
        if self._stream is not None and self.lost is None:
            try:
                getattr(self._stream, "flush", lambda: None)()
            except Exception as error:
                self.lost = error

    def isatty(self) -> bool:
        """Whether somebody sees it."""
        with suppress(Exception):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Printing:
    """As a context manager, puts such streams in the place of `sys.stdout` and `sys.stderr`."""

    def __enter__(self) -> Printing:
        self._before = sys.stdout, sys.stderr
        self._out, self._error = _Stream(sys.stdout), _Stream(sys.stderr)
        sys.stdout, sys.stderr = cast(TextIO, self._out), cast(TextIO, self._error)
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()
        self._error.flush()
        sys.stdout, sys.stderr = self._before

    def lost(self) -> Exception | None:
        """Why something of standard output was not written, so far; None where all of it was."""
        self._out.flush()
        return self._out.lost


def keep_descriptors_taken() -> None:
    """Open the null device as each of descriptors 0 to 2 that is closed: the next file would get it, and be printed into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def leave_quietly() -> None:
    """Let the interpreter's own flush as the process ends succeed: else it prints a traceback and changes the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
