"""What a kernel is: the interface that the pipelines call, and the checks and counts that every kernel shares."""

from __future__ import annotations

from typing import Protocol

import torch

from oocattn.kernels.partial import Partial

MAX_KEYS = 65_536
"""Keys that one accumulation may chain at most: beyond it the error of 16-bit matrix units grows with the keys."""


class Kernel(Protocol):
    """Attention of query rows over a range of keys, added to a state. Stateless: any thread may call it at any time."""

    name: str
    """The name that it is registered under."""

    max_keys: int
    """Keys that a caller should give to one call at most; `attend` is right beyond it too."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: Partial,
        *,
        scale: float,
        diagonal: bool,
    ) -> None:
        """Attend `key` and `value` with `query` and add the result to `state`, in place.

        query [g, n, D]; key, value [m, D], shared by the g heads; all of one dtype (float16, bfloat16, float32),
        contiguous, on the kernel's device. state: the n rows of the g heads, num [g, n, D]. With `diagonal`, n = m and
        query row i attends keys 0..i, without it every row attends every key. state.keys grows by the keys that each
        row attended, whatever their values. Nothing happens where n or m is 0. NaN and Inf flow as IEEE has them
        through the rows that attend them, and through no others. Raises ValueError where shapes or dtypes do not fit.
        """

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str) -> int:
        """Bytes that `attend` allocates at most for g = group_size, n = rows, m = keys, D = head_dim and that dtype."""


def check_operands(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: Partial, *, diagonal: bool) -> None:
    """Raise ValueError unless the operands of `Kernel.attend` fit each other: torch would broadcast some misfits."""
    group_size, rows, head_dim = query.shape
    if key.shape != value.shape or key.dim() != 2 or key.shape[1] != head_dim:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} do not fit query {list(query.shape)}: "
            f"expected [m, {head_dim}] twice"
        )
    if state.num.shape != query.shape:
        raise ValueError(f"state of {list(state.num.shape)} does not fit query {[group_size, rows, head_dim]}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}: expected one")
    if diagonal and key.shape[0] != rows:
        raise ValueError(f"a diagonal call needs as many keys as queries: found {key.shape[0]} and {rows}")


def count_keys(state: Partial, keys: int, *, diagonal: bool) -> None:
    """Enter a call over `keys` keys in the ledger of its rows: keys each, or i + 1 for row i of a diagonal call."""
    if diagonal:
        state.keys.add_(torch.arange(1, keys + 1, device=state.keys.device))
    else:
        state.keys.add_(keys)
