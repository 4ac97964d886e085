"""The interface of kernels: operands, and what a kernel does with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from oocattn.kernels.intervals import Band, Intervals
from oocattn.kernels.state import AttentionState
from oocattn.problem.scores import Scores

MAX_KEYS = 65_536  # the most keys to chain: beyond, the error of 16-bit matrix units grows
HALF_DTYPES = ("float16", "bfloat16")  # the dtypes of 16-bit matrix units


@dataclass(frozen=True)
class Operands:
    """Rows of g heads, and the keys and values that they attend. Raises ValueError where shapes or dtypes do not fit.

    query [g, n, D]; key, value [m, D], shared by the g heads; all of one dtype (float16, bfloat16, float32), contiguous
    but for the heads of `query`, which may lie apart, on one device. `intervals`: the keys of each row, relative to the
    first (`make_intervals`); None: all. n and m may be 0: then there is nothing to attend.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: Scores
    intervals: Intervals | None = None

    def __post_init__(self) -> None:
        query, key, value, intervals = self.query, self.key, self.value, self.intervals
        fit = query.dim() == 3 and key.dim() == 2 and key.shape == value.shape and key.shape[1] == query.shape[2]
        if not fit:  # torch would broadcast some
            raise ValueError(
                f"key {list(key.shape)} and value {list(value.shape)} do not fit query {list(query.shape)}: expected [m, D] "
                "twice, and [g, n, D]"
            )
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}: expected one")
        if intervals is not None and (intervals.rows, intervals.keys) != (self.rows, self.keys):
            found = f"{intervals.rows} rows and {intervals.keys} keys"
            raise ValueError(f"intervals of {found}: expected those of {self.rows} rows and {self.keys} keys")

    @property
    def rows(self) -> int:
        """Rows of each head, n."""
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        """Keys, m."""
        return len(self.key)

    @property
    def band(self) -> Band | None:
        """The band that the rows attend; None where their intervals have another shape."""
        return Band(-self.rows, self.keys) if self.intervals is None else self.intervals.band

    def check(self, state: AttentionState) -> None:
        """Raise ValueError for the state of other rows, heads or columns."""
        if state.num.shape != self.query.shape:
            raise ValueError(f"state of {list(state.num.shape)} does not fit query {list(self.query.shape)}")


class Kernel(ABC):
    """Attention of query rows over a range of keys, added to a state. It is stateless: any thread may call it."""

    name: str
    """The name that it is registered under."""

    max_keys = MAX_KEYS
    """The most keys to give to one call; `attend` is right beyond it too."""

    plans_shapes = False
    """True if the first call of each shape takes far longer than the next."""

    rounds_weights = False
    """True if softmax weights are rounded to the inputs' dtype; `verify` allows more."""

    @abstractmethod
    def attend(self, operands: Operands, state: AttentionState) -> None:
        """Add attention over the keys and values of `operands` to `state` [g, n, D], in place; not to its ledger.

        A row attends the keys [a, b) and [c, d) of its intervals, or all; without rows or keys nothing happens. On a GPU the
        work is launched on torch's current stream, and nothing waits for it.

        NaN and Inf reach the rows that attend them and no others, but for the 16-bit kernels on a GPU (hopper, fa3, cudnn,
        flash), which behave as torch's own attention: where rows attend different keys, NaN or Inf in a value may reach rows
        less than 512 away; with a library's, scores of -inf and the log-sum-exp of a row with NaN may be anything.

        Where the scores of a row are all large (1e3 and more in size, as of masked padding), equal ones count alike over any
        number of calls; kernels that merge a library's log-sum-exp on a GPU (fa3, cudnn, flash) do not promise this.

        Raises ValueError where the shape of `state` does not fit.
        """

    @abstractmethod
    def scratch_bytes(self, group_size: int, rows: int, keys: int, head_dim: int, dtype: str, threads: int) -> int:
        """Bytes that `attend` allocates at most, with so many threads on a CPU; on a GPU what torch's allocator takes."""

    @abstractmethod
    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int) -> str:
        """The reason why this kernel cannot serve, in words; "" if it can. No CUDA is touched where there is none."""


def unsupported_dtype(dtype: str, supported: Iterable[str]) -> str:
    """The reason why a dtype is not supported, in words; "" if it is."""
    return "" if dtype in supported else f"it attends {', '.join(supported)} only"
