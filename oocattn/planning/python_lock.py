"""Seconds that Python takes beside kernels, copies and files, of which one thread of a process works at a time. Pure.

On a CPU it takes turns with computing. Where lanes on GPUs share a process they wait for each other's: what they launch,
read and merge are hundreds of small calls, each of which may wait for threads that need Python as briefly. Workers of
a caller's that are processes wait for nobody.
"""

from __future__ import annotations

from oocattn.planning.measured import (
    LOCKED_CALL_SECONDS,
    LOCKED_READ_SECONDS,
    LOCKED_TILE_SECONDS,
    PARTIAL_FILE_SECONDS,
    PARTIAL_SECONDS,
    READ_SECONDS,
)


def on_cpus(reads: float, partials: int, *, on_disk: bool) -> float:
    """Seconds of so many reads, and partials, in memory or `on_disk`."""
    return reads * READ_SECONDS + partials * (PARTIAL_SECONDS + (PARTIAL_FILE_SECONDS if on_disk else 0.0))


def on_gpus(calls: float, reads: float, tiles: float) -> float:
    """Seconds of so many calls of kernels, reads, and query tiles of partials, over the lanes that share a process."""
    return calls * LOCKED_CALL_SECONDS + reads * LOCKED_READ_SECONDS + tiles * LOCKED_TILE_SECONDS
