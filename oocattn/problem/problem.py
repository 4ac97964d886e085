"""One attention problem: shapes, heads, mask, scores and dtypes, from the arrays' metadata alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any

from oocattn.problem.arrays import DTYPES, ArraySpec, check_arrays, heads_of_bias
from oocattn.problem.checks import check_problem
from oocattn.problem.given import NOTHING_GIVEN, GivenArrays
from oocattn.problem.mask import Mask
from oocattn.problem.options import ProblemOptions
from oocattn.problem.scores import Scale, Scores
from oocattn.problem.second_pass import SecondPass
from oocattn.problem.staged import key_arrays, query_arrays
from oocattn.records import OMITTED, UNRECORDED, Range, from_json

Extent = Annotated[int, Range(1, 2**48)]  # the size of one dimension
Place = Annotated[int, Range(0, 2**48)]  # a place in one, or a number of places

MOST_SAMPLED = 16  # masks of batch entries by which a plan is chosen


@dataclass(frozen=True)
class HeadGroup:
    """One (batch, KV head) with the query heads that share its keys and values, and are asked for.

    `outputs` are their places among the heads of `out`.
    """

    batch: int
    kv_head: int
    query_heads: tuple[int, ...]
    outputs: range


@dataclass(frozen=True)
class Problem:
    """One attention call: `out = softmax(scores) @ v` per head, over the keys that the mask gives each row.

    Shapes: q [batch, query_heads, queries, head_dim], k [batch, kv_heads, keys, head_dim], v [batch, kv_heads, keys,
    value_dim]. `dtype` is that of the inputs, `out_dtype` that of the output; the log-sum-exp is always float32. Of the
    queries those from `rows_asked[0]` up to `rows_asked[1]` are computed, of `heads` (None: all). `bias_heads` are the heads
    of the dataset's key_bias, 0 where none is used. `digests` are those of the arrays in `given`.
    With a `second_pass` the result is that of a pass over the pairs of another result, whose log-sum-exp is an input.
    """

    batch: Extent
    query_heads: Extent
    kv_heads: Extent
    queries: Extent
    keys: Extent
    head_dim: Extent
    value_dim: Extent
    dtype: str
    out_dtype: str
    scale: Scale
    rows_asked: tuple[Place, Place]
    causal: bool = False
    window_size: tuple[Place | None, Place | None] = (None, None)
    prefix: Place = 0
    sink_tokens: Place = 0
    softcap: Scale | None = None
    bias_heads: Place = 0
    heads: tuple[Place, ...] | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    given: Annotated[GivenArrays, UNRECORDED] = field(default_factory=GivenArrays, compare=False, repr=False)
    second_pass: Annotated[SecondPass | None, OMITTED] = None

    @cached_property
    def _chosen_groups(self) -> tuple[HeadGroup, ...]:
        """The head groups of one batch entry that have any of the heads, where not all are asked for."""
        found, first = [], 0
        for kv_head, members in groupby(self.heads or (), lambda head: head * self.kv_heads // self.query_heads):
            of_group = tuple(members)
            found.append(HeadGroup(0, kv_head, of_group, range(first, first + len(of_group))))
            first += len(of_group)
        return tuple(found)

    @property
    def entry_groups(self) -> int:
        """Head groups of one batch entry."""
        return self.kv_heads if self.heads is None else len(self._chosen_groups)

    @property
    def group_size(self) -> int:
        """g, the most query heads that share one K/V."""
        if self.heads is None:
            return self.query_heads // self.kv_heads
        return max(len(group.query_heads) for group in self._chosen_groups)

    @property
    def head_groups(self) -> int:
        """Number of (batch, KV head) problems."""
        return self.batch * self.entry_groups

    @property
    def out_heads(self) -> int:
        """Heads of `out`."""
        return self.query_heads if self.heads is None else len(self.heads)

    @property
    def out_rows(self) -> int:
        """Rows of each head of `out`."""
        return self.rows_asked[1] - self.rows_asked[0]

    @property
    def rows(self) -> int:
        """Rows of the output over all heads."""
        return self.batch * self.out_heads * self.out_rows

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of `out`."""
        return self.batch, self.out_heads, self.out_rows, self.columns

    @property
    def columns(self) -> int:
        """Columns of `out`, and of a state's numerator."""
        return self.value_dim if self.second_pass is None else self.second_pass.columns

    @property
    def itemsize(self) -> int:
        """Bytes of one input element."""
        return DTYPES[self.dtype]

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of a key, its value where that is read, and its bias, of one KV head."""
        return sum(each.heads * each.row_bytes for each in key_arrays(self))

    @property
    def query_row_bytes(self) -> int:
        """Bytes of a query of one head, and of its log-sum-exp where a second pass reads that."""
        return sum(each.row_bytes for each in query_arrays(self))

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs, each of them once."""
        return self.rows * self.query_row_bytes + self.head_groups * self.keys * self.kv_row_bytes

    def mask(self, batch: int = 0) -> Mask:
        """The mask of a batch entry: which keys each row attends."""
        used = self.keys if self.given.seqused_k is None else int(self.given.seqused_k[batch])
        if used not in self._masks:
            left, right = self.window_size
            options: dict[str, Any] = {"causal": self.causal, "left": left, "right": right}
            options |= {"prefix": self.prefix, "sinks": self.sink_tokens}
            edges, edges_k = self.given.cu_seqlens_q, self.given.cu_seqlens_k
            self._masks[used] = (
                Mask.of(self.queries, used, **options)
                if edges is None
                else Mask(edges, edges if edges_k is None else edges_k, **options)
            )
        return self._masks[used]

    @cached_property
    def _masks(self) -> dict[int, Mask]:
        """Masks that were asked for, by the number of keys that are used."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what follows from them

    @cached_property
    def masks(self) -> Mapping[Mask, int]:
        """The different masks of the batch entries, and how many entries have each."""
        if self.given.seqused_k is None:
            return {self.mask(): self.batch}
        return Counter(self.mask(batch) for batch in range(self.batch))

    @cached_property
    def sampled_masks(self) -> Mapping[Mask, int]:
        """Some of the masks in the place of all: of entries that use about as many keys, the one with the most.

        A plan is chosen by them, so that it takes no longer for a thousand lengths than for sixteen.
        """
        masks = sorted(self.masks.items(), key=lambda each: each[0].keys)
        step = -(-len(masks) // MOST_SAMPLED)
        groups = (masks[start : start + step] for start in range(0, len(masks), step))
        return {group[-1][0]: sum(entries for _, entries in group) for group in groups}

    @property
    def given_bytes(self) -> int:
        """Bytes of the arrays that were given, and of what a mask keeps of its documents: seven numbers each."""
        documents = 0 if self.given.cu_seqlens_q is None else self.mask().documents
        return sum(array.nbytes for _, array in self.given.items()) + 56 * documents

    @property
    def scores(self) -> Scores:
        """The terms of a score that all heads share."""
        return Scores(self.scale, self.softcap)

    def slopes(self, group: HeadGroup) -> tuple[float, ...] | None:
        """The ALiBi slopes of the heads of a group; None where there are none."""
        found = self.given.alibi_slopes
        if found is None:
            return None
        of_heads = found if found.ndim == 1 else found[group.batch]
        return tuple(float(of_heads[head]) for head in group.query_heads)

    def sinks(self, group: HeadGroup) -> tuple[float, ...] | None:
        """The learnable sinks of the heads of a group; None where there are none."""
        found = self.given.learnable_sink
        return None if found is None else tuple(float(found[head]) for head in group.query_heads)

    @property
    def has_default_scale(self) -> bool:
        """True if the scale is 1/sqrt(D), up to rounding."""
        return math.isclose(self.scale, 1.0 / math.sqrt(self.head_dim), rel_tol=1e-12)

    @property
    def is_plain(self) -> bool:
        """True if scores have no term but the scale."""
        return self.softcap is None and self.given.alibi_slopes is None and not self.bias_heads

    def state_bytes(self, rows: int) -> int:
        """Bytes of a state of `rows` rows: num, den and max in float32, two int64."""
        return self.group_size * rows * (self.columns + 2) * 4 + rows * 16

    def __str__(self) -> str:
        shared = "" if self.query_heads == self.kv_heads else f"/{self.kv_heads}"
        heads = f"{self.query_heads}{shared} head{'s' * (self.query_heads > 1)}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        tokens = f"{self.queries:,} tokens" if self.queries == self.keys else f"{self.queries:,} queries, {self.keys:,} keys"
        dims = f"D = {self.head_dim}" + ("" if self.value_dim == self.head_dim else f", Dv = {self.value_dim}")
        cast = "" if self.out_dtype == self.dtype else f" to {self.out_dtype}"
        return f"{batch}{heads} x {tokens} x {dims}, {self.dtype}{cast}, {', '.join(self._terms())}"

    def _terms(self) -> Iterator[str]:
        """What is asked beyond shapes, in words."""
        yield str(self.mask())
        used = self.given.seqused_k
        if used is not None:
            yield f"{used.min():,} to {used.max():,} keys used" if used.min() < used.max() else f"{used[0]:,} keys used"
        names = {"alibi_slopes": "ALiBi", "learnable_sink": "learnable sinks"}
        yield from (word for name, word in names.items() if name in self.digests)
        if not self.has_default_scale:
            yield f"scale {self.scale:g}"
        if self.softcap is not None:
            yield f"softcap {self.softcap:g}"
        if self.bias_heads:
            yield "key bias"
        if self.rows_asked != (0, self.queries):
            yield f"queries {self.rows_asked[0]:,} to {self.rows_asked[1]:,}"
        if self.heads is not None:
            yield f"{len(self.heads)} of the heads"

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs to be attended, over all query heads."""
        return self.out_heads * sum(mask.pairs(range(*self.rows_asked)) * count for mask, count in self.masks.items())

    @property
    def flops(self) -> int:
        """Floating-point operations of both products: 2 (D + Dv) a pair."""
        return 2 * (self.head_dim + self.columns) * self.pairs

    def head_group(self, index: int) -> HeadGroup:
        """Head group `index`, counted over the batch and then over the KV heads."""
        batch, of_entry = divmod(index, self.entry_groups)
        if self.heads is not None:
            return replace(self._chosen_groups[of_entry], batch=batch)
        heads = range(of_entry * self.group_size, (of_entry + 1) * self.group_size)
        return HeadGroup(batch, of_entry, tuple(heads), heads)

    @property
    def options(self) -> ProblemOptions:
        """The options that pose it."""
        return ProblemOptions(
            causal=self.causal,
            scale=self.scale,
            out_dtype=self.out_dtype,
            window_size=self.window_size,
            prefix=self.prefix,
            sink_tokens=self.sink_tokens,
            softcap=self.softcap,
            queries=None if self.rows_asked == (0, self.queries) else self.rows_asked,
            heads=self.heads,
            key_bias=bool(self.bias_heads),
            given=self.given,
        )


def make_problem(
    q: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    options: ProblemOptions = ProblemOptions(),  # noqa: B008 - frozen
    key_bias: ArraySpec | None = None,
) -> Problem:
    """Check the arrays against each other and the options, and return the problem they pose; ProblemError for none.

    The scale defaults to 1/sqrt(head_dim), the dtype of `out` to the inputs'. `key_bias` is used where the options say so.
    """
    check_arrays(q, k, v)
    options.check()
    batch, query_heads, queries, head_dim = q.four_dimensional
    (_, kv_heads, keys, _), value_dim = k.four_dimensional, v.four_dimensional[3]
    given = options.given
    problem = Problem(
        batch=batch,
        query_heads=query_heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=q.dtype,
        out_dtype=options.out_dtype or q.dtype,
        scale=1.0 / math.sqrt(head_dim) if options.scale is None else options.scale,
        rows_asked=options.queries or (0, queries),
        causal=options.causal,
        window_size=(options.window_size[0], None if options.causal else options.window_size[1]),
        prefix=options.prefix,
        sink_tokens=options.sink_tokens,
        softcap=options.softcap,
        bias_heads=heads_of_bias(key_bias, batch, query_heads, keys) if key_bias is not None and options.key_bias else 0,
        heads=options.heads,
        digests=given.digests,
        given=given,
    )
    check_problem(problem)
    return problem


def read_problem(content: object, given: GivenArrays = NOTHING_GIVEN) -> Problem:
    """The problem that JSON holds, with the arrays that were kept beside it; ValueError for anything else."""
    return with_given(from_json(Problem, content), given)


def with_given(problem: Problem, given: GivenArrays) -> Problem:
    """A problem that was read, with its arrays. Raises ValueError where they are others, or it is no problem."""
    if dict(problem.digests) != dict(given.digests):
        raise ValueError(f"its arrays have the digests {given.digests!r:.200}, expected {problem.digests!r:.200}")
    found = replace(problem, given=given)
    check_problem(found)
    return found
