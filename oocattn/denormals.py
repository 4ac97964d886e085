"""Denormal numbers, which a processor may have been told to flush to zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def keep_denormals() -> Iterator[None]:
    """Compute with denormal numbers in this thread, whatever torch was told."""
    with _flush(False):
        yield


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Compute with 0 for denormal numbers in this thread, where the processor can: products with some take far longer."""
    with _flush(True):
        yield


@contextmanager
def _flush(wanted: bool) -> Iterator[None]:
    smallest = np.ones(1, np.uint32).view(np.float32)
    flushed = not (smallest + smallest).view(np.uint32).any()
    if flushed == wanted:
        yield
        return
    import torch  # seconds, where nothing else needs it

    torch.set_flush_denormal(wanted)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)
