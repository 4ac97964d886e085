"""One attention problem: shapes, heads, mask, scale and dtypes, and their checks, from the arrays' metadata alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from oocattn.errors import ProblemError
from oocattn.problem.mask import Mask, make_mask
from oocattn.problem.scores import Scale, Scores
from oocattn.records import Range, from_json

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # supported dtypes and their size in bytes

MAX_HEAD_DIM = 256

_OTHER_ORDER = "; if the axes are in another order than [B, H, N, D], import the tensors with --layout"
"""Advice for a shape that may have another order of axes."""

Extent = Annotated[int, Range(1, 2**48)]  # the size of one dimension


@dataclass(frozen=True)
class ArraySpec:
    """Name, shape and dtype of one input array, as found."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def four_dimensional(self) -> tuple[int, int, int, int]:
        """The shape [B, H, N, D], with B = 1 for [H, N, D]; ProblemError for other ranks."""
        if len(self.shape) in (3, 4):
            batch, heads, tokens, head_dim = (1, *self.shape)[-4:]
            return batch, heads, tokens, head_dim
        raise ProblemError(
            f"array {self.name!r} has shape {list(self.shape)}: expected [B, H, N, D] or [H, N, D]; "
            "reshape it, or import it with --layout"
        )


@dataclass(frozen=True)
class HeadGroup:
    """One (batch, KV head) with the query heads that share its keys and values."""

    batch: int
    kv_head: int
    query_heads: range


@dataclass(frozen=True)
class Problem:
    """One attention call: `out = softmax(scale * q @ k.T) @ v` per head, causal or not.

    Shapes: q [batch, query_heads, tokens, head_dim]; k and v [batch, kv_heads, tokens, head_dim]. `dtype` is that of the
    inputs, `out_dtype` that of the output; the log-sum-exp is always float32.
    """

    batch: Extent
    query_heads: Extent
    kv_heads: Extent
    tokens: Extent
    head_dim: Extent
    dtype: str
    out_dtype: str
    causal: bool
    scale: Scale

    @property
    def group_size(self) -> int:
        """g = Hq / Hkv, the query heads that share one K/V."""
        return self.query_heads // self.kv_heads

    @property
    def head_groups(self) -> int:
        """Number of (batch, KV head) problems."""
        return self.batch * self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of the output: tokens of all query heads."""
        return self.batch * self.query_heads * self.tokens

    @property
    def itemsize(self) -> int:
        """Bytes of one input element."""
        return DTYPES[self.dtype]

    @property
    def mask(self) -> Mask:
        """The mask: which keys each row attends."""
        return make_mask(self.tokens, self.tokens, causal=self.causal)

    @property
    def scores(self) -> Scores:
        """The terms of a score."""
        return Scores(self.scale)

    def state_bytes(self, rows: int) -> int:
        """Bytes of a state of `rows` rows: num, den and max in float32, two int64."""
        return self.group_size * rows * (self.head_dim + 2) * 4 + rows * 16

    def __str__(self) -> str:
        shared = "" if self.group_size == 1 else f"/{self.kv_heads}"
        heads = f"{self.query_heads}{shared} head{'s' * (self.query_heads > 1)}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        cast = "" if self.out_dtype == self.dtype else f" to {self.out_dtype}"
        return f"{batch}{heads} x {self.tokens:,} tokens x D = {self.head_dim}, {self.dtype}{cast}, {self.mask}"

    @property
    def pairs(self) -> int:
        """Query-key pairs to be attended, over all query heads."""
        return self.batch * self.query_heads * self.mask.pairs()

    @property
    def flops(self) -> int:
        """Floating-point operations of both products: 4 D a pair."""
        return 4 * self.head_dim * self.pairs

    def head_group(self, index: int) -> HeadGroup:
        """Head group `index`, counted over the batch and then over the KV heads."""
        batch, kv_head = divmod(index, self.kv_heads)
        first = kv_head * self.group_size
        return HeadGroup(batch, kv_head, range(first, first + self.group_size))


def make_problem(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    *,
    causal: bool = False,
    scale: float | None = None,
    out_dtype: str | None = None,
) -> Problem:
    """Check the three arrays against each other and return the problem they pose; ProblemError for none.

    `scale` defaults to 1/sqrt(head_dim), `out_dtype` to the inputs' dtype.
    """
    for spec in (q, k, v):
        if spec.dtype not in DTYPES:
            raise ProblemError(
                f"array {spec.name!r} has dtype {spec.dtype}: expected one of {', '.join(DTYPES)}; convert it first"
            )
    _check_shapes(q, k, v)
    for spec in (k, v):
        if spec.dtype != q.dtype:
            raise ProblemError(
                f"array {spec.name!r} has dtype {spec.dtype}: expected {q.dtype}, the dtype of q: all three have one dtype; "
                "convert one of them, or import the tensors with --dtype"
            )
    batch, query_heads, tokens, head_dim = q.four_dimensional
    kv_heads = k.four_dimensional[1]
    shape = batch, query_heads, kv_heads, tokens, head_dim
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    problem = Problem(*shape, q.dtype, out_dtype or q.dtype, causal, scale)
    check_problem(problem)
    return problem


def _check_shapes(q: ArraySpec, k: ArraySpec, v: ArraySpec) -> None:
    """Check the shapes against each other, but for the query heads of a K/V head."""
    for spec in (q, k, v):
        if 0 in spec.four_dimensional:
            raise ProblemError(
                f"array {spec.name!r} is empty: every dimension must be at least 1, found {list(spec.shape)}; write it again"
            )
    shapes = ", ".join(f"{name} {list(spec.shape)}" for name, spec in (("q", q), ("k", k), ("v", v)))
    (batch, _, queries, head_dim), (_, kv_heads, keys, _) = q.four_dimensional, k.four_dimensional
    if queries != keys:
        raise ProblemError(
            f"array {k.name!r} has shape {list(k.shape)}: expected {queries:,} tokens, as {q.name!r} has ({shapes}), for "
            "queries and keys must be equally many for now; give queries for all keys, and take the rows of the result that "
            f"you need{_OTHER_ORDER}"
        )
    expected = [batch, kv_heads, keys, head_dim]
    for spec, heads in ((k, ""), (v, ", and the heads and tokens of k")):
        if list(spec.four_dimensional) != expected:
            fitting = expected[-len(spec.shape) :] if batch == 1 else expected
            raise ProblemError(
                f"array {spec.name!r} has shape {list(spec.shape)}: expected {fitting}, with the batch "
                f"size and head dimension of q{heads} ({shapes}); write the one that is wrong again{_OTHER_ORDER}"
            )


def read_problem(content: object) -> Problem:
    """The problem that JSON holds; ValueError for anything else."""
    problem = from_json(Problem, content)
    check_problem(problem)
    return problem


def check_problem(problem: Problem) -> None:
    """Raise ProblemError for what is no attention problem, or none that is supported."""
    if problem.query_heads % problem.kv_heads:
        raise ProblemError(
            f"q has {problem.query_heads} heads and k has {problem.kv_heads}: the query heads must be a multiple of the KV "
            f"heads; write k and v with one head for each group of query heads{_OTHER_ORDER}"
        )
    if problem.head_dim > MAX_HEAD_DIM:
        raise ProblemError(
            f"head dimension {problem.head_dim} of q is larger than {MAX_HEAD_DIM}, the largest supported{_OTHER_ORDER}"
        )
    for name, dtype in (("dtype", problem.dtype), ("out_dtype", problem.out_dtype)):
        if dtype not in DTYPES:
            raise ProblemError(f"{name} = {dtype!r} (str): expected one of {', '.join(DTYPES)}")
    problem.scores.check()
    if problem.rows * problem.head_dim >= 1 << 63:
        raise ProblemError(f"{problem.rows} rows of {problem.head_dim} elements: expected fewer than 2^63 elements in all")
