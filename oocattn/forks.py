"""Refuse what does not survive a fork, before a call waits for it or fails on it.

Of the threads of its parent, a forked process has only the one that forked. PyTorch computes on CPUs with two libraries that
cannot take that: in the child, the first parallel loop of libgomp waits for threads that are not there (GCC bug 58378), in
the thread that forked, and MKL, which accounts for its buffers by thread, may wait without end for an entry whose owner is
not there, in any new one (one fork in 5 to 40). CUDA refuses to work in the child of a process that used it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from oocattn.errors import ProblemError
from oocattn.naming import setting

if TYPE_CHECKING:
    from distributed import Client

FORKED = 0x40  # the flag of a process that was forked and executed no program since: PF_FORKNOEXEC of Linux
LOOP = 1 << 18  # elements of a loop that PyTorch divides among threads: it does above 32,768

ASLEEP_SECONDS, ENOUGH_SECONDS = 1.0, 10.0
"""After so long a loop does not end any more, or a thread is not there: seconds asleep, and seconds in all."""

PAUSE_SECONDS = 0.01  # between two looks at that process

REMEDY = "start processes by spawn (multiprocessing.set_start_method('spawn')), or fork before anything is computed"


def is_forked() -> bool:
    """Whether this process is a fork that executed no program since; False where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        # Field 9 of proc(5). Field 2 is a name in brackets that may hold anything.
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        return bool(int(fields[6]) & FORKED)
    return False


def refuse_lost_threads() -> None:
    """Raise ProblemError where computing might never end in this process, because PyTorch computed before it was forked.

    MKL says whether it holds buffers; whether a loop of libgomp ends, only another fork can try.
    """
    if is_forked() and (_Computing.inherited or not _loop_ends()):
        raise ProblemError(
            "this process was forked from one in which PyTorch had computed, and the threads that it computed with are not "
            f"here, so computing might never end: {REMEDY}"
        )


def refuse_lost_gpus() -> None:
    """Raise ProblemError where CUDA was in use before this process was forked."""
    import torch

    if torch.cuda._is_in_bad_fork():
        raise ProblemError(
            f"this process was forked from one that had used CUDA, which does not work in forks: {REMEDY}, or choose a "
            f"kernel for the CPU, {setting('kernel', 'cpu')}"
        )


def refuse_lost_client(client: Client) -> None:
    """Raise ProblemError where the client was made before this process was forked: the thread that serves it is not here."""
    if is_forked():
        served = threading.Event()
        if client.loop is not None:
            client.loop.add_callback(served.set)
        if not served.wait(ENOUGH_SECONDS):
            raise ProblemError(
                "the client was made before this process was forked, and does not work here: make one in this process"
            )


def _loop_ends() -> bool:
    """Whether a parallel loop ends in a fork of this process."""
    import psutil
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are other threads
        process = os.fork()
    if process == 0:
        try:
            torch.ones(LOOP).exp_()
        finally:
            os._exit(0)
    start, asleep, ended = time.monotonic(), 0.0, False
    try:
        while not ended and asleep <= ASLEEP_SECONDS and time.monotonic() - start <= ENOUGH_SECONDS:
            asleep += PAUSE_SECONDS * (psutil.Process(process).status() == psutil.STATUS_SLEEPING)
            time.sleep(PAUSE_SECONDS)
            ended = os.waitpid(process, os.WNOHANG) != (0, 0)
    except (ChildProcessError, psutil.NoSuchProcess):  # another of this process waits for its children
        ended = True
    finally:  # also after Ctrl-C
        if not ended:
            with suppress(ProcessLookupError, ChildProcessError):  # as above
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    return ended


class _Computing:
    """Whether PyTorch has computed in this process, and whether it had in the one that this process was forked from."""

    here = False
    inherited = False

    @classmethod
    def look(cls) -> None:
        """Ask MKL before a fork, in the parent: in the child, MKL might wait for a lock that is held."""
        cls.here = cls.here or _mkl_buffers() > 0

    @classmethod
    def inherit(cls) -> None:
        """Start over after a fork, in the child."""
        cls.inherited, cls.here = cls.inherited or cls.here, False


os.register_at_fork(before=_Computing.look, after_in_child=_Computing.inherit)


def note_computing() -> None:
    """Note that this process computes with PyTorch from now on."""
    _Computing.here = True


def _mkl_buffers() -> int:
    """How many buffers MKL holds, also for products of the caller's; 0 where PyTorch is not here or is built without MKL."""
    extension = sys.modules.get("torch._C")
    count = ctypes.c_int(0)
    if extension is not None:
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(str(extension.__file__)).mkl_serv_mem_stat(ctypes.byref(count))  # MKL's `mkl_mem_stat`
    return count.value
