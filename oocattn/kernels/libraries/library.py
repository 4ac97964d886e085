"""What the kernels around a library's attention call share: tiles no larger than is exact, and folding the results."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from oocattn.kernels.cuda.device import allocated_bytes
from oocattn.kernels.kernel import MAX_KEYS, check_operands
from oocattn.kernels.merging import fold
from oocattn.kernels.state import AttentionState
from oocattn.kernels.tiles import level_step, make_tiles
from oocattn.problem.problem import DTYPES

_OWN_BYTES = 1 << 19
"""What a library call allocates for itself beside its results: random seeds, counters, a workspace."""


class LibraryKernel(ABC):
    """A kernel whose tiles are calls of a library that returns the divided output and the log-sum-exp.

    Everything is launched on torch's current stream and nothing waits for it. A call is cut into tiles of at most
    65,536 keys, so that none chains more keys than is exact; rows are not cut, for large calls are the fast ones.
    """

    name: str
    max_keys = MAX_KEYS
    plans_shapes = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: AttentionState,
        *,
        scale: float,
        diagonal: bool,
    ) -> None:
        """See `Kernel.attend`."""
        check_operands(query, key, value, state, diagonal=diagonal)
        rows, keys = query.shape[1], key.shape[0]
        for tile in make_tiles(rows, keys, max(1, rows), level_step(keys, MAX_KEYS), diagonal=diagonal):
            own = slice(tile.first_key, tile.last_key)
            block = query[:, tile.first_row : tile.last_row]
            result = self._call(block, key[own], value[own], scale, tile.diagonal)
            fold(state.rows(*tile[:2]), *result, keys=tile.last_key - tile.first_key, diagonal=tile.diagonal)
            del result  # before the next call needs the memory

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """See `Kernel.scratch_bytes`: the output and log-sum-exp of a tile, and those of the one before.

        Those are let go before, but torch was once seen to hold 64 MiB more than a call's (756 MiB of 692, H200).
        """
        of_call = (group_size * rows * head_dim * DTYPES[dtype], group_size * rows * 4)
        return allocated_bytes(*of_call, *of_call, _OWN_BYTES, *self._buffers(group_size, rows, keys, head_dim))

    @abstractmethod
    def lacks(self, device: torch.device, dtype: str, head_dim: int) -> str:
        """See `Kernel.lacks`."""

    @abstractmethod
    def _call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [g, n, D], of any strides but the last, and the natural log-sum-exp [g, n] of one tile."""

    def _buffers(self, group_size: int, rows: int, keys: int, head_dim: int) -> tuple[int, ...]:
        """Sizes in bytes of large buffers that the library allocates beside its results."""
        return ()


def shared_by_heads(tensor: torch.Tensor, group_size: int) -> torch.Tensor:
    """Keys or values [m, D] as [1, g, m, D], without a copy."""
    return tensor.expand(1, group_size, *tensor.shape)
