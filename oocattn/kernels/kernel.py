"""The interface of kernels: operands, and what a kernel does with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from oocattn.kernels.intervals import Band, Intervals
from oocattn.kernels.reductions.base import Reducing
from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.scores import Scores

SMALL_SEGMENT, LEAST_ALONE = 2 << 20, 10 << 20
"""Bytes that torch's allocator takes on a GPU for tensors of up to 1 MiB, and from which on one has a segment of its own."""

HALF_DTYPES = ("float16", "bfloat16")  # the dtypes of 16-bit matrix units


@dataclass(frozen=True)
class Operands:
    """Rows of g heads, and the keys and values that they attend. Raises ValueError where shapes or dtypes do not fit.

    query [g, n, D]; key [m, D] and value [m, Dv], shared by the g heads; all of one dtype (float16, bfloat16, float32),
    contiguous but for the heads of `query`, which may lie apart, on one device. `intervals`: the keys of each row,
    relative to the first (`make_intervals`); None: all. n and m may be 0: then there is nothing to attend. `slopes`: one
    of each head, for ALiBi; then `intervals` are given, for the rows' positions. `key_bias` [g, m] or [1, m], float32, is
    added to the scores. `attended`: called by kernels of the CPU, from any thread, with the pairs of a head that they have
    attended since they called it; about as many as there are. `shift` [g, n] and `projection` [Dv, W], float32, the
    latter on the CPU, are of a second pass: scores are taken less the row's shift, with 0 as the state's maximum, and
    values times the projection, which the state has W columns for; or the weights are `reducing`, and the state has the
    columns of that. They are for kernels that take `shifted` scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: Scores
    intervals: Intervals | None = None
    slopes: tuple[float, ...] | None = None
    key_bias: torch.Tensor | None = None
    attended: Callable[[int], object] | None = None
    shift: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    reducing: Reducing | None = None

    def __post_init__(self) -> None:
        query, key, value, intervals = self.query, self.key, self.value, self.intervals
        fit = (
            query.dim() == 3 and key.dim() == value.dim() == 2 and len(key) == len(value) and key.shape[1] == query.shape[2]
        )
        if not fit:  # torch would broadcast some
            raise ValueError(
                f"key {list(key.shape)} and value {list(value.shape)} do not fit query {list(query.shape)}: expected "
                "[m, D], [m, Dv] and [g, n, D]"
            )
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}: expected one")
        if intervals is not None and (intervals.rows, intervals.keys) != (self.rows, self.keys):
            found = f"{intervals.rows} rows and {intervals.keys} keys"
            raise ValueError(f"intervals of {found}: expected those of {self.rows} rows and {self.keys} keys")
        if self.slopes is not None and (intervals is None or len(self.slopes) != len(query)):
            raise ValueError(f"{len(self.slopes)} slopes: expected {len(query)}, and intervals for the positions of rows")
        bias = self.key_bias
        if bias is not None and (
            bias.dtype != torch.float32 or list(bias.shape) not in ([1, len(key)], [len(query), len(key)])
        ):
            raise ValueError(
                f"key_bias {bias.dtype} {list(bias.shape)}: expected float32 [1, {len(key)}] or [{len(query)}, {len(key)}]"
            )
        if self.shift is not None and self.shift.shape != query.shape[:2]:
            raise ValueError(f"shift {list(self.shift.shape)}: expected {list(query.shape[:2])}")
        if self.projection is not None and (self.projection.dim() != 2 or len(self.projection) != value.shape[1]):
            raise ValueError(f"projection {list(self.projection.shape)}: expected [{value.shape[1]}, W]")

    @property
    def rows(self) -> int:
        """Rows of each head, n."""
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        """Keys, m."""
        return self.key.shape[0]

    @property
    def is_plain(self) -> bool:
        """True if scores have no term but the scale."""
        return self.scores.softcap is None and self.slopes is None and self.key_bias is None

    @property
    def band(self) -> Band | None:
        """The band that the rows attend; None where their intervals have another shape."""
        return Band(-self.rows, self.keys) if self.intervals is None else self.intervals.band

    def part(self, rows: range, keys: range) -> Operands:
        """A tile of the call, as views; without intervals where its rows attend all its keys and need no positions.

        It does not tell what is attended, and its weights are not reduced.
        """
        intervals = self.intervals and self.intervals.part(rows, keys)
        if intervals is not None and self.slopes is None and intervals.is_full:
            intervals = None
        of_rows, of_keys = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        bias = None if self.key_bias is None else self.key_bias[:, of_keys]
        tensors = self.query[:, of_rows], self.key[of_keys], self.value[of_keys]
        shift = None if self.shift is None else self.shift[:, of_rows]
        return Operands(*tensors, self.scores, intervals, self.slopes, bias, None, shift, self.projection)

    def tell_rows(self, rows: range) -> None:
        """Say that all pairs of some rows are attended."""
        if self.attended is not None and rows:
            of_rows = None if self.intervals is None else self.intervals.bounds.part(rows)
            self.attended(len(rows) * self.keys if of_rows is None else int(of_rows.pairs().sum()))

    def check(self, state: AttentionState) -> None:
        """Raise ValueError for the state of other rows, heads or columns."""
        columns = (self.value if self.projection is None else self.projection).shape[1]
        expected = (*self.query.shape[:2], columns if self.reducing is None else self.reducing.columns)
        if state.num.shape != expected:
            raise ValueError(f"state of {list(state.num.shape)}: expected {list(expected)}")


class Kernel(ABC):
    """Attention of query rows over a range of keys, added to a state. It is stateless: any thread may call it."""

    name: str
    """The name that it is registered under."""

    plans_shapes = False
    """True if the first call of each shape takes far longer than the next."""

    shifted = False
    """True if it is one for second passes: operands have a shift and a projection."""

    rounds_weights = False
    """True if softmax weights are rounded to the inputs' dtype; `verify` allows more."""

    @abstractmethod
    def attend(self, operands: Operands, state: AttentionState) -> None:
        """Add attention over the keys and values of `operands` to `state` [g, n, Dv], in place; not to its ledger.

        A row attends the keys [a, b) and [c, d) of its intervals, or all; without rows or keys nothing happens. On a GPU the
        work is launched on torch's current stream, and nothing waits for it.

        NaN and Inf reach the rows that attend them and no others, but for kernels on a GPU's matrix units (all but torch),
        which behave as torch's own attention: where rows attend different keys, NaN or Inf in a value may reach rows
        less than 512 away; with a library's, scores of -inf and the log-sum-exp of a row with NaN may be anything.

        Where the scores of a row are all large (1e3 and more in size, as of masked padding), equal ones count alike over any
        number of calls; kernels that merge a library's log-sum-exp on a GPU (fa3, cudnn, flash) do not promise this.

        Raises ValueError where the shape of `state` does not fit.
        """

    @abstractmethod
    def scratch_bytes(self, call: CallSize) -> int:
        """Bytes that `attend` allocates at most; on a GPU what torch's allocator takes. Large calls do not take more."""

    def segment_bytes(self, call: CallSize) -> int:
        """Bytes of those that a lane on a GPU takes in one piece at first, of which the tensors of its calls are cut.

        The others are for small ones, which do not come from it.
        """
        large = self.scratch_bytes(call) - SMALL_SEGMENT
        return large if large >= LEAST_ALONE else 0

    @abstractmethod
    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        """The reason why this kernel cannot serve, in words; "" if it can. No CUDA is touched where there is none."""


def unsupported_dtype(dtype: str, supported: Iterable[str]) -> str:
    """The reason why a dtype is not supported, in words; "" if it is."""
    return "" if dtype in supported else f"it attends {', '.join(supported)} only"
