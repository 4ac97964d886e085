"""Masks that are described and not made: what layers get in the place of a dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

from oocattn.errors import ProblemError
from oocattn.integrations.composition import Band, Span, band_of, spans_of


@dataclass(frozen=True)
class DescribedMask:
    """A mask that is not made yet: what transformers says of it. Layers get it in the place of a dense one.

    `ndim` and `shape` are those of the dense mask. `generate` makes the mask of a static cache itself, and hands it to the
    model as the attention mask, which must be told from a mask [B, N] of padding.
    """

    ndim = 4

    batch: int
    queries: int
    keys: int
    first_query: int
    first_key: int
    asked: dict[str, Any]

    @classmethod
    def of(
        cls, batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, **asked: Any
    ) -> DescribedMask:
        """The mask that transformers asks for; one that was made before is taken as it is, as dense ones are."""
        if isinstance(made := asked.get("attention_mask"), cls):
            return made
        return cls(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), asked)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 1, Nq, Nk]."""
        return self.batch, 1, self.queries, self.keys

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """The mask that `sdpa` gets, bool [B, 1, Nq, Nk]."""
        made: torch.Tensor | None = sdpa_mask(
            self.batch, self.queries, self.keys, self.first_query, self.first_key, **{**self.asked, **_WHOLE}
        )
        return made

    @property
    def elements(self) -> int:
        """Elements of the dense mask."""
        return math.prod((self.batch, self.queries, self.keys))

    @cached_property
    def band(self) -> Band:
        """The keys that each row attends, but for padding. Raises ProblemError where they are no band."""
        return band_of(self.asked["mask_function"], self.first_query - self.first_key)

    @property
    def is_band(self) -> bool:
        """Whether it is a band of keys, and padding at the ends."""
        try:
            return bool(self.band and self.spans)
        except ProblemError:
            return False

    @cached_property
    def spans(self) -> list[Span]:
        """The keys of each batch entry that are no padding. Raises ProblemError where there are gaps."""
        return spans_of(self.asked.get("attention_mask"), self.batch, self.keys, self.first_key)

    @cached_property
    def plain(self) -> bool | None:
        """The `is_causal` of torch's call that needs no mask here; None where it needs one."""
        try:
            band, whole = self.band, self.spans == [(0, self.keys)] * self.batch
        except ProblemError:
            return None
        if not whole or (band.left is not None and band.left < self.queries - 1 + band.offset):
            return None
        if band.right is None or band.offset + band.right >= self.keys - 1:
            return False  # also the first row attends all
        return True if band.right == 0 and band.offset == 0 and self.queries == self.keys else None


_WHOLE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
"""Arguments of `sdpa_mask` that have it make every mask."""
