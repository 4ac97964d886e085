"""Calls that tests have made in a process of its own, and a look at these processes."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from oocattn.verification.beside import PROGRAM
from oocattn.verification.certify import Examination, Examined


class Found(NamedTuple):
    """What an examination found, and the modules and the anonymous memory (bytes) that its process has then."""

    examined: Examined | None
    modules: set[str]
    memory: int


def examine(examination: Examination) -> Found:
    found = examination()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Found(found, set(sys.modules), int(status["RssAnon"].split()[0]) << 10)


def say(text: str) -> str:
    print(f"printed: {text}")
    logging.getLogger("oocattn").warning("logged: %s", text)
    logging.getLogger("oocattn").info("not for everyone")
    warnings.warn(f"warned: {text}", UserWarning, stacklevel=1)
    return text


def fail() -> None:
    raise ValueError("it cannot be done")


def wait(noted: Path) -> None:
    noted.touch()
    time.sleep(600)


def serving(process: int | None = None) -> list[psutil.Process]:
    """The processes that were begun beside passes and have not ended."""
    found = []
    for each in psutil.Process(process).children():
        with suppress(psutil.NoSuchProcess):  # or a zombie
            found += [each] if PROGRAM in each.cmdline() else []
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
