"""The arrays of which a subproblem stages rows: those of query chunks, and those of key chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oocattn.problem.arrays import DTYPES, KEY_BIAS
from oocattn.problem.second_pass import LSE

if TYPE_CHECKING:
    from oocattn.problem.problem import Problem


@dataclass(frozen=True)
class StagedArray:
    """An array, with the columns of a row of one head (0: a single number without an axis) and its dtype.

    `heads` are those that a head group stages at most; `first` is the token, as the problem counts them, of its first row.
    """

    name: str
    width: int
    dtype: str
    heads: int
    first: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one head."""
        return max(1, self.width) * DTYPES[self.dtype]


def query_arrays(problem: Problem) -> tuple[StagedArray, ...]:
    """The arrays of a query chunk: q, and in a second pass the log-sum-exp, which only rows that are asked for have."""
    q = StagedArray("q", problem.head_dim, problem.dtype, problem.group_size)
    if problem.second_pass is None:
        return (q,)
    return q, StagedArray(LSE, 0, "float32", problem.group_size, problem.rows_asked[0])


def key_arrays(problem: Problem) -> tuple[StagedArray, ...]:
    """The arrays of a key chunk: k, v where it is read, and the bias of each key, if there is one."""
    found = [StagedArray("k", problem.head_dim, problem.dtype, 1)]
    if problem.second_pass is None or problem.second_pass.has_values:
        found.append(StagedArray("v", problem.value_dim, problem.dtype, 1))
    if problem.bias_heads:
        found.append(StagedArray(KEY_BIAS, 0, "float32", min(problem.bias_heads, problem.group_size)))
    return tuple(found)
