"""Processes that are there at once: forks of one process that has imported everything and started nothing.

Starting Python and importing PyTorch and Dask takes three seconds of a core. What a test needs a process of its own for, to
kill, stop or signal it, seldom has to do with that. Dask's worker processes are made here as well.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TextIO

import dask
from distributed.utils import get_mp_context

dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
get_mp_context().set_forkserver_preload(
    ["distributed", "oocattn.cli.main", "oocattn.pipelines.engines.dask.engine", "oocattn.pipelines.lane.cpu"]
)


class WarmProcess:
    """A call in a process of its own, with its output; `pid`, `returncode` and the methods are those of a Popen."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        context = get_mp_context()
        (out, to_out), (err, to_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self._process = context.Process(target=_call, args=(to_out, to_err, dict(os.environ), function, arguments))
        self._process.start()
        to_out.close()
        to_err.close()
        self.stdout, self.stderr = _opened(out), _opened(err)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 60.0) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it has not ended after {timeout} s"
        return self.returncode

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """Its output and errors, at most what a pipe holds."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()


def command(*arguments: str, pause: float = 0.0) -> WarmProcess:
    """The command `oocattn`; each subproblem of a run takes so many seconds more."""
    return WarmProcess(_command, arguments, pause)


def script(text: str, *arguments: str) -> WarmProcess:
    """What `python -c` would run."""
    return WarmProcess(_script, text, arguments)


def printed(text: str, *arguments: str) -> str:
    """The output of a script that succeeds."""
    process = script(text, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def _opened(connection: Connection) -> TextIO:
    with connection:
        return os.fdopen(os.dup(connection.fileno()))


def _call(
    out: Connection, err: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: Any
) -> None:
    """Make the call as a fresh process would."""
    os.environ.update(environment)
    for connection, number in ((out, 1), (err, 2)):
        os.dup2(connection.fileno(), number)
        connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(function(*arguments))


def _script(text: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(text, "-c", "exec"), {"__name__": "__main__"})


def _command(arguments: tuple[str, ...], pause: float) -> int:
    from oocattn.__main__ import run
    from oocattn.pipelines.lane.cpu import CpuDevice

    launch = CpuDevice.launch

    def launch_late(*given: Any) -> Any:
        time.sleep(pause)
        return launch(*given)

    CpuDevice.launch = launch_late  # type: ignore[method-assign]
    sys.argv = ["oocattn", *arguments]
    return run()
