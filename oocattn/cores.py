"""The cores that this process may use, and those that the lanes of a machine may."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what the control group of this process may use, of version 2 or 1."""

_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Cores(NamedTuple):
    """How many cores the lanes of a machine may use: all of them together, and each of them.

    `memory` is what the process of a lane may still take of host memory, in bytes, at least.
    """

    machine: int
    lane: int
    memory: float = math.inf


class UsableCores(NamedTuple):
    """The cores that a process may use, by the numbers of their threads, and how many at a time; `memory` as above."""

    names: tuple[str, ...]
    at_once: int
    memory: float = math.inf


FindCores = Callable[[], Cores | None]
"""Finds the cores of a machine with workers; None stands for those of this process."""


@dataclass(frozen=True)
class Workers:
    """Workers that a run may have, and the most of them on one machine and in one process; 0 stands for all.

    None are as many as this machine would have: one, or one for each GPU. `find_cores` finds the cores of a machine.
    """

    count: int | None = None
    of_machine: int = 0
    of_process: int = 0
    find_cores: FindCores = lambda: None


def count_cores() -> int:
    """The processors that this process may use; two that share a core count as two."""
    return len(_processors())


def usable_cores() -> UsableCores:
    """The cores that this process may use: those of its processors, and no more at a time than its control group's quota.

    Processors that share a core count as one: a kernel gains nothing by the second, and PyTorch has a thread for each core.
    """
    names = tuple(sorted({_siblings(processor) for processor in _processors()}))
    return UsableCores(names, max(1, math.ceil(min(len(names), _quota()))))


def shared_cores(found: Iterable[UsableCores]) -> Cores:
    """The cores of lanes on one machine, whose processes may use these.

    Processes that may use the same cores are taken to share a quota as well.
    """
    together, memory = dict[tuple[str, ...], int](), math.inf
    for names, at_once, left in found:
        together[names] = min(at_once, together.get(names, at_once))
        memory = min(memory, left)
    different = {name for names in together for name in names}
    return Cores(min(len(different), sum(together.values())), min(together.values()), memory)


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(processor: int) -> str:
    """The processors that share a core with this one; itself where the system does not say."""
    with suppress(OSError):
        return Path(_SIBLINGS.format(processor)).read_text().strip()
    return str(processor)


def _quota() -> float:
    """The cores that the control group of this process may use at a time; inf without a limit."""
    for names in _QUOTAS:
        with suppress(OSError, ValueError):  # "max" is none
            quota, period = " ".join((CONTROL_GROUP / name).read_text() for name in names).split()
            if int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
    return math.inf
