"""Checks of a whole problem, however it was made: posed over a dataset, or read from a file."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from oocattn.errors import ProblemError
from oocattn.naming import as_given, named
from oocattn.problem.arrays import DTYPES, MAX_HEAD_DIM, other_order
from oocattn.problem.given import check_given

if TYPE_CHECKING:
    from oocattn.problem.problem import Problem


def check_problem(problem: Problem) -> None:
    """Raise ProblemError for what is no attention problem, or none that is supported."""
    if problem.query_heads % problem.kv_heads:
        raise ProblemError(
            f"q has {problem.query_heads} heads and k has {problem.kv_heads}: the query heads must be a multiple of the KV "
            f"heads; write k and v with one head for each group of query heads{other_order()}"
        )
    for name, dim in (("q", problem.head_dim), ("v", problem.value_dim)):
        if dim > MAX_HEAD_DIM:
            raise ProblemError(
                f"head dimension {dim} of {name} is larger than {MAX_HEAD_DIM}, the largest supported{other_order()}"
            )
    for name, dtype in (("dtype", problem.dtype), ("out_dtype", problem.out_dtype)):
        if dtype not in DTYPES:
            raise ProblemError(f"{as_given(name, dtype)}: expected one of {', '.join(DTYPES)}")
    if problem.bias_heads not in (0, 1, problem.query_heads):
        raise ProblemError(f"key_bias has {problem.bias_heads} heads: expected 1 or {problem.query_heads}, those of q")
    problem.options.check()
    problem.scores.check()
    _check_asked(problem)
    given = problem.given
    sizes = {"batch": problem.batch, "query_heads": problem.query_heads, "queries": problem.queries, "keys": problem.keys}
    if given.cu_seqlens_q is None and given.cu_seqlens_k is not None:
        names = named("cu_seqlens_q"), named("cu_seqlens_k")
        raise ProblemError(f"{names[1]} is given without {names[0]}: expected both, or {names[0]} alone for both")
    if given.cu_seqlens_q is not None and given.cu_seqlens_k is None and problem.queries != problem.keys:
        raise ProblemError(
            f"{named('cu_seqlens_q')} is given alone, for {problem.queries:,} queries and {problem.keys:,} keys: expected "
            f"{named('cu_seqlens_k')} too, the boundaries of the same documents among the keys"
        )
    check_given(given, **sizes)
    if problem.rows * problem.value_dim >= 1 << 63:
        raise ProblemError(f"{problem.rows} rows of {problem.value_dim} elements: expected fewer than 2^63 elements in all")


def _check_asked(problem: Problem) -> None:
    """Check the range of queries, and the heads, that are asked for."""
    start, stop = problem.rows_asked
    if not 0 <= start < stop <= problem.queries:
        raise ProblemError(
            f"{as_given('queries', (start, stop))}: expected 0 <= start < stop <= {problem.queries:,}, the number of queries"
        )
    heads = problem.heads
    if heads is not None and not (heads and heads[-1] < problem.query_heads and all(a < b for a, b in pairwise(heads))):
        raise ProblemError(
            f"{as_given('heads', list(heads)):.100}: expected ascending indices of query heads, each once, up to "
            f"{problem.query_heads - 1}"
        )
