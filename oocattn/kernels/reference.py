"""The float64 reference kernel: slow, on any device, to compare fast ones with.

The state that it adds to is float32 like everyone's, so it is right to a few 1e-7; inside a call every product,
exponential and sum is float64.
"""

from __future__ import annotations

import torch

from oocattn.kernels.plain import PlainKernel

PRODUCT_BYTES = 3 << 20
"""Bytes of the CPU's matrix products per thread; measured: 1.7 to 2.8 MiB (MKL)."""


class ReferenceKernel(PlainKernel):
    """Attention written out in float64, in tiles small enough for a CPU's caches."""

    name = "reference"
    precision = torch.float64
    score_bytes = 1 << 20

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """See `Kernel.scratch_bytes`: a tile, and what the CPU's matrix products keep."""
        return sum(self._tile_bytes(group_size, rows, keys, head_dim)) + threads * PRODUCT_BYTES
