"""What does not survive a fork, told before a call waits for it or fails on it.

A forked process has the memory of its parent, but of its threads the one that forked alone. libgomp, with which PyTorch
computes on CPUs, keeps a pool of threads for each thread that computes: in the child, the first parallel loop of the thread
that forked waits for threads that are not there (GCC bug 58378). Other threads of the child make pools of their own, and so
does one whose parent had not computed yet. CUDA refuses to work in the child of a process that used it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from oocattn.errors import ProblemError

if TYPE_CHECKING:
    from distributed import Client

FORKED = 0x40
"""The flag of a process that was forked and executed no program since: PF_FORKNOEXEC of Linux."""

LOOP = 1 << 18
"""Elements of a loop that PyTorch shares out among threads: it does above 32,768."""

ASLEEP, ENOUGH = 1.0, 10.0
"""Seconds after which a loop does not end any more, or a thread is not there: those asleep, and those in all."""

PAUSE = 0.01
"""Seconds between two looks at that process."""

REMEDY = "start processes by spawn (multiprocessing.set_start_method('spawn')), or fork before anything is computed"


def is_forked() -> bool:
    """Whether this process is a fork that executed no program since; False where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        # Field 9 of proc(5). Field 2 is a name in brackets that may hold anything.
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        return bool(int(fields[6]) & FORKED)
    return False


def refuse_lost_threads() -> None:
    """Raise ProblemError where computing in this thread would wait for threads of the process that it was forked from.

    Whether it would, libgomp does not say: another fork tries it.
    """
    if is_forked() and not _loop_ends():
        raise ProblemError(
            "this process was forked from one in which PyTorch had computed, and the threads that it computed with are not "
            f"here, so computing would never end: {REMEDY}"
        )


def refuse_lost_gpus() -> None:
    """Raise ProblemError where CUDA was in use before this process was forked."""
    if torch.cuda._is_in_bad_fork():
        raise ProblemError(
            f"this process was forked from one that had used CUDA, which does not work in forks: {REMEDY}, or choose a "
            "kernel for the CPU (--kernel cpu)"
        )


def refuse_lost_client(client: Client) -> None:
    """Raise ProblemError where the client was made before this process was forked: the thread that serves it is not here."""
    if is_forked():
        served = threading.Event()
        if client.loop is not None:
            client.loop.add_callback(served.set)
        if not served.wait(ENOUGH):
            raise ProblemError(
                "the client was made before this process was forked, and does not work here: make one in this process"
            )


def _loop_ends() -> bool:
    """Whether a parallel loop ends in a fork of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are other threads
        process = os.fork()
    if process == 0:
        try:
            torch.ones(LOOP).exp_()
        finally:
            os._exit(0)
    start, asleep = time.monotonic(), 0.0
    with suppress(ChildProcessError, psutil.NoSuchProcess):  # where another of this process waits for its children
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if asleep > ASLEEP or time.monotonic() - start > ENOUGH:
                os.kill(process, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(process, 0)
                return False
            asleep += PAUSE * (psutil.Process(process).status() == psutil.STATUS_SLEEPING)
            time.sleep(PAUSE)
    return True
