"""Runs commands as processes at a fraction of a second each: a process that has imported everything forks for each of them.

It reads a JSON list of arguments on each line of standard input, and answers with how the command ended.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import fuzzing
from fuzzing import LIMIT_SECONDS, Outcome

ADDRESS_SPACE = 12 << 30
"""A command that would take all memory of the machine ends at that."""


class Commands:
    """The process that forks, as a context manager."""

    def __enter__(self) -> Commands:
        self._folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def run(self, arguments: tuple[str, ...]) -> Outcome:
        """Run a command to its end, or until it has taken twice as long as it may."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        out, err, events = (
            (Path(self._folder.name) / name).read_text("utf-8", "replace") for name in ("out", "err", "events")
        )
        return Outcome(out=out, err=err, events=tuple(events.splitlines()), **answer)


def _serve(folder: Path) -> None:
    import distributed  # noqa: F401
    import torch  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            _be_command(folder, json.loads(line))
        waited, usage = _wait(process)
        seconds = time.monotonic() - start
        grown = (usage.ru_maxrss - before) << 10
        print(json.dumps({"code": os.waitstatus_to_exitcode(waited), "seconds": seconds, "grown": grown}), flush=True)


def _wait(process: int) -> tuple[int, Any]:
    descriptor = os.pidfd_open(process)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        if not selector.select(2 * LIMIT_SECONDS):
            os.kill(process, signal.SIGABRT)  # faulthandler says where it was
    os.close(descriptor)
    _, status, usage = os.wait4(process, 0)
    return status, usage


def _be_command(folder: Path, arguments: list[str]) -> None:
    """Become the command; does not return."""
    import faulthandler

    from oocattn.__main__ import run

    for descriptor, name in ((1, "out"), (2, "err"), (3, "events")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fuzzing.watch(_Written(3))
    warnings.showwarning = _show_warning
    sys.argv = ["oocattn", *arguments]
    try:
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Written(list[str]):
    """A list whose items go to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def append(self, item: str) -> None:
        os.write(self._descriptor, f"{item}\n".encode("utf-8", "backslashreplace"))


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: object) -> None:
    if f"{os.sep}oocattn{os.sep}" in filename:
        print(f"{category.__name__}: {message}", file=sys.stderr)
    else:
        os.write(3, f"lets a warning of {filename}:{lineno} through: {message}\n".encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
