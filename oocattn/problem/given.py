"""Arguments of a problem that are arrays: the boundaries of documents, numbers of keys, slopes and sinks.

JSON holds their digests. The arrays themselves are kept in the result's group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.errors import ProblemError
from oocattn.naming import named

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "cu_seqlens_q": np.dtype("<i8"),
    "cu_seqlens_k": np.dtype("<i8"),
    "seqused_k": np.dtype("<i8"),
    "alibi_slopes": np.dtype("<f4"),
    "learnable_sink": np.dtype("<f4"),
}
"""The arguments by name, and the dtype that each is kept in."""

MOST_ITEMS = 1 << 26
"""Numbers that an argument has at most: half a gigabyte."""


@dataclass(frozen=True, eq=False)
class GivenArrays:
    """The arrays that a caller gave, None for others: each of the dtype in `DTYPES`, contiguous, not to be written to.

    `cu_seqlens_q` and `cu_seqlens_k` [documents + 1], `seqused_k` [B], `alibi_slopes` [Hq] or [B, Hq], `learnable_sink`
    [Hq].
    """

    cu_seqlens_q: Array | None = None
    cu_seqlens_k: Array | None = None
    seqused_k: Array | None = None
    alibi_slopes: Array | None = None
    learnable_sink: Array | None = None

    def items(self) -> Iterator[tuple[str, Array]]:
        """Name and content of those that are given."""
        for field in fields(self):
            array = getattr(self, field.name)
            if array is not None:
                yield field.name, array

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """A digest of each, by name: of its shape and its bytes."""
        return {name: digest_of(array) for name, array in self.items()}


NOTHING_GIVEN = GivenArrays()


def digest_of(array: Array) -> str:
    """The digest of an array's shape and bytes."""
    content = hashlib.sha256(repr(array.shape).encode())
    content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()[:32]


def check_given(given: GivenArrays, *, batch: int, query_heads: int, queries: int, keys: int) -> None:
    """Raise ProblemError for arrays that do not fit the problem, or each other."""
    bounds = {"cu_seqlens_q": (given.cu_seqlens_q, queries), "cu_seqlens_k": (given.cu_seqlens_k, keys)}
    for name, (edges, end) in bounds.items():
        if edges is not None:
            _check_boundaries(name, edges, end)
    edges_q, edges_k = given.cu_seqlens_q, given.cu_seqlens_k
    if edges_q is not None and edges_k is not None and len(edges_q) != len(edges_k):
        raise ProblemError(
            f"{named('cu_seqlens_q')} has {len(edges_q) - 1:,} documents and {named('cu_seqlens_k')} has "
            f"{len(edges_k) - 1:,}: expected as many of both; a document without queries or keys has two equal boundaries"
        )
    used = given.seqused_k
    if used is not None and edges_q is not None:
        raise ProblemError(
            f"{named('seqused_k')} and {named('cu_seqlens_q')} are both given: expected one of them, for documents say "
            f"themselves how many keys each has; leave {named('seqused_k')} out"
        )
    shapes: dict[str, list[tuple[int, ...]]] = {
        "seqused_k": [(batch,)],
        "alibi_slopes": [(query_heads,), (batch, query_heads)],
        "learnable_sink": [(query_heads,)],
    }
    for name, allowed in shapes.items():
        array = getattr(given, name)
        if array is not None and array.shape not in allowed:
            expected = " or ".join(str(list(shape)) for shape in allowed)
            each = "batch entry" if name == "seqused_k" else "query head of q"
            raise ProblemError(f"{named(name)} has shape {list(array.shape)}: expected {expected}, a number for each {each}")
        if array is not None and not np.isfinite(array).all():
            raise ProblemError(f"{named(name)} has values that are not finite in float32: expected finite ones")
    if used is not None and (used.min() < 0 or used.max() > keys):
        raise ProblemError(
            f"{named('seqused_k')} has values from {used.min():,} to {used.max():,}: expected 0 to {keys:,}, "
            "the number of keys, each"
        )


def _check_boundaries(name: str, edges: Array, end: int) -> None:
    """Raise ProblemError unless these are ascending boundaries from 0 to `end`."""
    tokens = f"{end:,}, the number of {'queries' if name.endswith('q') else 'keys'}"
    if edges.ndim != 1 or len(edges) < 2:
        raise ProblemError(f"{named(name)} has shape {list(edges.shape)}: expected [documents + 1], from 0 to {tokens}")
    falls = np.flatnonzero(edges[1:] < edges[:-1])
    if len(falls):
        at = int(falls[0])
        raise ProblemError(
            f"{named(name)} falls from {edges[at]:,} to {edges[at + 1]:,} at {at + 1}: expected ascending boundaries"
        )
    if edges[0] != 0 or edges[-1] != end:
        raise ProblemError(f"{named(name)} runs from {edges[0]:,} to {edges[-1]:,}: expected 0 to {tokens}")
