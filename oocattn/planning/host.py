"""What the host of a run has: memory, and what a small durable file costs there."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from oocattn.cores import CONTROL_GROUP
from oocattn.errors import IntegrityError
from oocattn.planning.machine import FILE_SECONDS, Hardware
from oocattn.planning.memory import PAGE
from oocattn.planning.timing import undisturbed_seconds
from oocattn.storage.files.durable import write_durably
from oocattn.storage.files.folders import existing

FILE_MOMENT, MOST_FILES = 0.1, 16
"""Seconds after which no more files are written to measure what one costs, and how many at most."""


def default_host_memory() -> int:
    """Half of the memory that is free now, in bytes; of a container's limit where there is one."""
    return int(min([psutil.virtual_memory().available, *container_limits()]) // 2)


def container_limits() -> list[int]:
    """The limits on this process's memory that its control group sets, in bytes (`distributed.system` imports Dask)."""
    limits = []
    for name in ("memory.max", "memory.high", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is none
            limits.append(int((CONTROL_GROUP / name).read_text()))
    return limits


def file_seconds(folder: Path) -> float:
    """Seconds that a small durable file costs where `folder` is or will be; `FILE_SECONDS` where none can be written."""
    try:
        with tempfile.TemporaryDirectory(prefix=".oocattn-", dir=existing(folder)) as temporary:
            seconds: list[float] = []
            began = time.perf_counter()
            while len(seconds) < MOST_FILES and (len(seconds) < 4 or time.perf_counter() - began < FILE_MOMENT):
                path = Path(temporary, str(len(seconds)))
                seconds.append(undisturbed_seconds(partial(write_durably, path, [np.zeros(PAGE, np.uint8)])))
    except (OSError, IntegrityError):
        return FILE_SECONDS
    return max(sorted(seconds)[len(seconds) // 8], 1e-6)  # threads of the system that write wait for a core unseen


def round_to_power(found: float) -> float:
    """What was measured, to a power of two."""
    return float(2.0 ** round(math.log2(found)))


def round_rates(hardware: Hardware) -> Hardware:
    """With what was measured to powers of two, for the choice of a plan: the same conditions make the same one."""
    cores = hardware.lane_cores if hardware.device == "cpu" else 1.0  # so that rates of lanes are as their cores
    return replace(
        hardware,
        kernel_flops=cores * round_to_power(hardware.kernel_flops / cores),
        read_rate=round_to_power(hardware.read_rate),
        reread_rate=round_to_power(hardware.reread_rate),
        file_seconds=round_to_power(hardware.file_seconds),
    )
