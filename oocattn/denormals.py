"""Numbers below the smallest normal one: a processor can flush them to zero, which a caller may have asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def denormals_kept() -> Iterator[None]:
    """Within, this thread computes with such numbers, whatever `torch.set_flush_denormal` was told before."""
    smallest = np.ones(1, np.uint32).view(np.float32)
    flushed = not (smallest + smallest).view(np.uint32).any()
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
