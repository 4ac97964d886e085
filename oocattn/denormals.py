"""Denormal numbers, which a processor may have been told to flush to zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keep_denormals() -> Iterator[None]:
    """Compute with denormal numbers in this thread, whatever torch was told."""
    smallest = np.ones(1, np.uint32).view(np.float32)
    flushed = not (smallest + smallest).view(np.uint32).any()
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
