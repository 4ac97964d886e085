"""Tensors in memory of their own."""

from __future__ import annotations

import math
from mmap import mmap

import torch

_OWN_PAGES = 1 << 17  # bytes of a tensor


def own_tensor(*shape: int) -> torch.Tensor:
    """A float32 tensor, of pages of its own if large: of what threads free the heap keeps a part, for each another one."""
    nbytes = 4 * math.prod(shape)
    if nbytes < _OWN_PAGES:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.frombuffer(mmap(-1, nbytes), dtype=torch.float32).view(shape)
