"""How the axes of a stored tensor lie: the order of [B, H, N, D] in it, and where several tensors are packed in one.

A layout names the stored axes in order: b batch, h heads, n tokens, d head dimension. Packed tensors have one more letter:
"3" is an axis of q, k and v, as in FlashAttention's [B, N, 3, H, D], and "f" the features of a projection,
[B, N, (Hq + 2 Hkv) D]: the heads of q, then those of k, then those of v, each with its D numbers. Pure integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from oocattn.errors import ProblemError
from oocattn.naming import by_face, named
from oocattn.records import Count, Pattern, Range
from oocattn.units import ceil_div

LAYOUTS = ("bhnd", "bnhd", "hnd", "nhd")
"""Orders of a tensor's axes. Those of a key bias are the same without d; its heads and batch may be left out."""

PACKED_LAYOUTS = ("bn3hd", "n3hd", "bnf", "nf")
"""Orders of the axes of one tensor that holds q, k and v."""


@dataclass(frozen=True)
class Axes:
    """The axes of a stored tensor.

    `order` has a letter for each. Of a packed tensor, `part` counts along "3", and the tensor has `heads` heads of
    `head_dim` numbers along "f", from head `first_head` on.
    """

    order: Annotated[str, Pattern("[bhnd3f]{1,5}")] = "bhnd"
    part: Annotated[int, Range(0, 2)] = 0
    first_head: Count = 0
    heads: Count = 0
    head_dim: Count = 0

    def __post_init__(self) -> None:
        if "n" not in self.order or len({*self.order}) != len(self.order):
            raise ValueError(f"the order of axes is {self.order}: expected n, and each letter once")

    @property
    def row_rank(self) -> int:
        """The rank of what one token of a head has: 1, or 0 of a key bias."""
        return 1 if self.order[-1] in "df" else 0

    @property
    def packed(self) -> bool:
        """Whether the stored tensor has q, k and v."""
        return not {"3", "f"}.isdisjoint(self.order)

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor, [B, H, N, D], without B where it is not stored, of a stored shape.

        A shape of another rank is returned as it is: no problem can be posed of it.
        """
        if len(stored) != len(self.order):
            return tuple(stored)
        size = dict(zip(self.order, stored, strict=True))
        if "f" in size:
            size |= {"h": self.heads, "d": self.head_dim}
        wanted = "bhnd" if self.row_rank else "bhn"
        return tuple(size.get(axis, 1) for axis in wanted if axis in size or axis != "b")

    def select(self, batch: int, head: int, tokens: slice) -> tuple[slice, ...]:
        """The part of the stored tensor that is some tokens of one head: of extent 1 along every axis but n, and d or f."""
        return self.select_heads(batch, range(head, head + 1), tokens)

    def select_heads(self, batch: int, heads: range, tokens: slice) -> tuple[slice, ...]:
        """The part of the stored tensor that is some tokens of neighbouring heads."""
        first = self.first_head + heads.start
        parts = {
            "b": slice(batch, batch + 1),
            "h": slice(heads.start, heads.stop),
            "n": tokens,
            "d": slice(None),
            "3": slice(self.part, self.part + 1),
            "f": slice(first * self.head_dim, (first + len(heads)) * self.head_dim),
        }
        return tuple(parts[axis] for axis in self.order)

    def select_all(self, batch: int, tokens: slice) -> tuple[slice, ...]:
        """The part of the stored tensor that is all of some tokens."""
        parts = {"b": slice(batch, batch + 1), "n": tokens}
        return tuple(parts.get(axis, slice(None)) for axis in self.order)

    def among(self, head: int) -> tuple[slice, ...]:
        """The part of what `select_heads` selects that is its head number `head`."""
        parts = {"h": slice(head, head + 1), "f": slice(head * self.head_dim, (head + 1) * self.head_dim)}
        return tuple(parts.get(axis, slice(None)) for axis in self.order)

    def chunk_of(self, head: int, chunks: Sequence[int]) -> int:
        """The number, along the axis of heads, of the chunk that a head begins in."""
        if "f" in self.order:
            return (self.first_head + head) * self.head_dim // chunks[self.order.index("f")]
        return head // chunks[self.order.index("h")] if "h" in self.order else 0

    def heads_in(self, chunks: Sequence[int], stored: Sequence[int]) -> int:
        """How many heads a chunk has, of all tensors that are packed in it."""
        size = {axis: min(pair) for axis, *pair in zip(self.order, chunks, stored, strict=True)}
        if "f" in size:
            return ceil_div(size["f"], self.head_dim)
        return size.get("h", 1) * size.get("3", 1)

    @property
    def token_axis(self) -> int:
        """The stored axis of tokens."""
        return self.order.index("n")


BHND = Axes()


def plain_axes(name: str, layout: str, stored: Sequence[int], label: str) -> Axes:
    """The axes of q, k or v by itself. Raises ProblemError, which calls it `name` at `label`, for another rank."""
    if len(layout) != len(stored):
        raise ProblemError(
            f"{name} ({label}) has shape {list(stored)}: layout {layout} has {len(layout)} dimensions; name the order of "
            f"its axes with {named('layout')}, one of {', '.join(LAYOUTS)}, or one for each tensor"
        )
    return Axes(layout)


def packed_axes(layout: str, stored: Sequence[int], heads: int, kv_heads: int, label: str) -> dict[str, Axes]:
    """The axes of q, k and v in one tensor, of `heads` and `kv_heads` along "f". Raises ProblemError for another shape."""
    if len(stored) != len(layout):
        raise ProblemError(
            f"qkv ({label}) has shape {list(stored)}: layout {layout} has {len(layout)} dimensions; name the order of "
            f"its axes with {named('layout')}, one of {', '.join(PACKED_LAYOUTS)}"
        )
    size = dict(zip(layout, stored, strict=True))
    if "3" in size:
        if size["3"] != 3:
            raise ProblemError(
                f"qkv ({label}) has shape {list(stored)}: expected 3, q, k and v, along axis 3 of layout {layout}"
            )
        return {name: Axes(layout, part=part) for part, name in enumerate(("q", "k", "v"))}
    packed = heads + 2 * kv_heads
    if not (heads and kv_heads) or size["f"] % packed:
        counts = by_face("heads and kv_heads", "--qkv-heads HQ,HKV")
        raise ProblemError(
            f"qkv ({label}) has {size['f']:,} features for {heads} query heads and {kv_heads} K/V heads: expected a "
            f"multiple of query heads + 2 K/V heads; say how many of each there are with {counts}"
        )
    q = Axes(layout, heads=heads, head_dim=size["f"] // packed)
    k = replace(q, first_head=heads, heads=kv_heads)
    return {"q": q, "k": k, "v": replace(k, first_head=heads + kv_heads)}
