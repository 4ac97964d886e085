"""A call in a process of its own, beside what this one does: threads would hold Python's lock, which a GPU's launches need.

The process is a new interpreter with the modules of this one, but neither its `__main__` nor PyTorch. The call comes through
its standard input, and what was returned goes back through its standard output, pickled: nothing else is unpickled. It ends
when its input does, so also when this process is killed.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from oocattn.denormals import keep_denormals
from oocattn.threads import EXIT_SECONDS, begin_call

PROCESS_SECONDS = 1.0
"""Seconds until a process makes its call, on an idle core."""

PATIENCE_SECONDS = 10.0
"""Seconds that a process has to come up in, after the answer was asked for."""

PROCESS_BYTES = 128 << 20
"""Host memory of a process before it makes its call, where Zarr imports optional packages; else a third of that."""

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from oocattn.verification.beside import serve; serve()"

GREETING = os.fsencode(__file__) + b"\n"
"""What a process says first: another program, or another installation of this package, says something else."""

logger = logging.getLogger("oocattn")

T = TypeVar("T")


@dataclass
class _Answer:
    """What a call returned, or why it failed, and what it logged and warned of meanwhile."""

    value: Any = None
    failure: str = ""
    logged: list[tuple[int, str]] = field(default_factory=list)
    warned: list[tuple[str, type[Warning], str, int]] = field(default_factory=list)


class ProcessBeside(Generic[T]):
    """As a context manager, has a process that makes one call while inside. It only saves time: there may be none."""

    held = 0
    """Host memory that the process may hold, in bytes; 0 where there is none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._greeted, self._answered = Future[bool](), Future[bytes]()

    def __enter__(self) -> ProcessBeside[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def begin(self, call: Callable[[], T], nbytes: int) -> None:
        """Begin the call, which takes at most so many bytes, if it can be sent to another process, and one can be had."""
        if getattr(sys, "frozen", False) or not sys.executable:  # then no file is Python and nothing else
            return
        command = [sys.executable, "-c", PROGRAM, *(entry for entry in sys.path if isinstance(entry, str))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            request = pickle.dumps(call)
            self._process = subprocess.Popen(command, **pipes, start_new_session=True)  # which a terminal's Ctrl-C misses
            self._answered = begin_call(self._exchange, self._process, request)
        except Exception as error:  # whatever a caller's objects raise, or the system
            logger.info("no process could be had beside the pass: %s", error)
            if self._process is not None:
                with self._process as process:
                    process.kill()
                self._process = None
            return
        self.held = PROCESS_BYTES + nbytes

    def answer(self) -> T | None:
        """Wait for what the call returns. None where it is to be made here: see `begin`, and where its process failed.

        A process fails also where the call raises. What it raises here is in the words of this process.
        """
        if self._process is None:
            return None
        found: _Answer | None = None
        with suppress(Exception):  # of pipes that break and pickles that are cut off
            if self._greeted.result(PATIENCE_SECONDS):
                found = pickle.loads(self._answered.result())
        if (code := self._process.poll() or 0) < 0:
            logger.warning("a process was killed (signal %d): what it had begun is done here, which takes longer", -code)
        self._end()
        if found is None or found.failure:
            logger.info("the process beside the pass failed: %s", "it ended" if found is None else found.failure)
            return None
        for level, text in found.logged:
            logger.log(level, "%s", text)
        for warning in found.warned:
            warnings.warn_explicit(*warning)
        value: T = found.value
        return value

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes) -> bytes:
        """Send the request, wait for all of the answer, and for the end of the process."""
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None
        try:
            with answers, requests:
                self._greeted.set_result(there := answers.readline() == GREETING)
                if not there:
                    return b""
                requests.write(request)
                requests.flush()
                return answers.read()
        finally:
            process.wait()

    def _end(self) -> None:
        """End the process, however far it is."""
        if self._process is not None:
            self._process.kill()
            with suppress(Exception):  # as above, or a process that the system cannot end now
                self._answered.result(EXIT_SECONDS)
            self.held = 0


class _Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__()
        self._answer = answer

    def emit(self, record: logging.LogRecord) -> None:
        self._answer.logged.append((record.levelno, record.getMessage()))


def serve() -> None:
    """Make the call that is sent to this process, send back what it returned, and end; also where it raises."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    code = 1
    try:
        answers.write(GREETING)
        answers.flush()
        call = pickle.load(sys.stdin.buffer)
        begin_call(_end_with_input)
        pickle.dump(_made(call), answers)
        answers.flush()
        code = 0
    finally:
        os._exit(code)  # threads may still be at something


def _made(call: Callable[[], object]) -> _Answer:
    answer = _Answer()
    logger.addHandler(_Log(answer))
    logger.setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught, keep_denormals():
        warnings.simplefilter("default")
        try:
            answer.value = call()
        except Exception as error:
            answer.failure = f"{type(error).__name__}: {error}"
    answer.warned = [(str(each.message), each.category, each.filename, each.lineno) for each in caught]
    return answer


def _end_with_input() -> None:
    """End this process when its input ends: what it does is not wanted any more."""
    os.read(0, 1)
    os._exit(1)
