"""Seconds that Python takes beside kernels, copies and files, of which one thread of a process works at a time. Pure.

On a CPU it takes turns with computing. Lanes on GPUs wait for each other's: what they launch, read and merge are hundreds of
small calls, each of which may wait for threads that need Python as briefly.
"""

from __future__ import annotations

from oocattn.planning.measured import (
    LOCKED_CALL_SECONDS,
    LOCKED_PARTIAL_SECONDS,
    LOCKED_READ_SECONDS,
    PARTIAL_FILE_SECONDS,
    PARTIAL_SECONDS,
    READ_SECONDS,
)
from oocattn.planning.memory import READ_BYTES


def on_cpus(reads: float, partials: int, *, on_disk: bool) -> float:
    """Seconds of so many reads, and partials, in memory or `on_disk`."""
    return reads * READ_SECONDS + partials * (PARTIAL_SECONDS + (PARTIAL_FILE_SECONDS if on_disk else 0.0))


def on_gpus(calls: float, nbytes: float, partials: float) -> tuple[float, float]:
    """What asks for Python in all lanes of a process, and its seconds: calls of the kernel, reads of bytes, and partials."""
    reads = nbytes / READ_BYTES
    seconds = calls * LOCKED_CALL_SECONDS + reads * LOCKED_READ_SECONDS + partials * LOCKED_PARTIAL_SECONDS
    return calls + reads + partials, seconds
