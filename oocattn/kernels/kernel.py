"""The interface of kernels, and the checks that every kernel shares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from oocattn.kernels.intervals import Intervals
from oocattn.kernels.state import AttentionState
from oocattn.problem.scores import Scores

MAX_KEYS = 65_536
"""The most keys to chain: beyond, the error of 16-bit matrix units grows."""


class Kernel(Protocol):
    """Attention of query rows over a range of keys, added to a state.

    It is stateless: any thread may call it at any time.
    """

    name: str
    """The name that it is registered under."""

    max_keys: int
    """The most keys to give to one call; `attend` is right beyond it too."""

    plans_shapes: bool
    """True if the first call of each shape takes far longer than the next."""

    rounds_weights: bool
    """True if softmax weights are rounded to the inputs' dtype; `verify` allows more."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: AttentionState,
        *,
        scores: Scores,
        intervals: Intervals | None,
    ) -> None:
        """Attend `key` and `value` with `query` and add the result to `state`, in place.

        query [g, n, D]; key, value [m, D], shared by the g heads; all of one dtype (float16, bfloat16, float32),
        contiguous but for the heads of `query`, which may lie apart, on one device. state: the n rows of the g heads, num
        [g, n, D]. `intervals` says which keys each row attends, all of them where it is None: [a, b) and
        [c, d) of each row relative to the first key, as `make_intervals` makes them of a mask. `scores` are the
        terms of a score. The ledger of the state is left alone: who calls enters the keys. Nothing happens where n or m is
        0. On a GPU the work is launched on torch's current stream, and nothing waits for it.

        NaN and Inf make the output of the rows that attend them NaN or Inf. They reach no other rows, but for the
        16-bit kernels on a GPU (hopper, fa3, cudnn, flash), which behave as torch's own attention: where rows attend
        different keys, NaN or Inf in a value may also reach rows of the kernel's tile that do not attend it (less than 512
        away); with a library's, scores of -inf may become NaN, and the log-sum-exp of a row with NaN may be anything.

        Where the scores of a row are all large (1e3 and more in size, as of padding that a constant masks), equal ones count
        alike over any number of calls, and the largest decide the row, as far as float32 tells scores apart. Kernels that
        merge a library's log-sum-exp on a GPU (fa3, cudnn, flash) do not promise this: it rounds the number of keys away.

        Raises ValueError where shapes or dtypes do not fit.
        """

    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """Bytes that `attend` allocates at most.

        The call has g = group_size, n = rows, m = keys, D = head_dim and that dtype; on a CPU it has so many threads. On a
        GPU these are the bytes that torch's caching allocator takes from the device.
        """

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int) -> str:
        """The reason why this kernel cannot serve, in words; "" if it can.

        Asked is attention of inputs of `dtype` and D = head_dim on `device`. Nothing of CUDA is touched on a machine that
        has none.
        """


def check_operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: AttentionState, intervals: Intervals | None
) -> None:
    """Raise ValueError unless operands fit each other: torch would broadcast some."""
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
    if intervals is None:
        return
    if (intervals.rows, intervals.keys) != (rows, key.shape[0]):
        found = f"{intervals.rows} rows and {intervals.keys} keys"
        raise ValueError(f"intervals of {found}: expected those of {rows} rows and {key.shape[0]} keys")


def unsupported_dtype(dtype: str, supported: Iterable[str]) -> str:
    """The reason why a dtype is not supported, in words; "" if it is."""
    return "" if dtype in supported else f"it attends {', '.join(supported)} only"
