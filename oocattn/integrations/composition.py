"""What a mask of transformers is made of: the functions that it composes, read as a band of keys and spans without padding.

The library hands a mask over as a function of (batch, head, query, key) that closes over the functions it was composed of.
Those that are a band are known here by name. Nothing of the size of the mask is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import masking_utils as masks

from oocattn.errors import ProblemError

Span = tuple[int, int]
"""The first key that is no padding, and the one after the last."""


class Band(NamedTuple):
    """The keys j that row i attends: i + offset - left <= j <= i + offset + right; None is no bound."""

    offset: int
    left: int | None
    right: int | None


def band_of(mask: Callable[..., Any], offset: int) -> Band:
    """The band of a mask whose first row is at key `offset`. Raises ProblemError for one that is no band."""
    bounds = [_bounds(name, window) for name, window in _parts(mask)]
    left, right = (min((found for found in side if found is not None), default=None) for side in zip(*bounds, strict=True))
    return Band(offset, left, right)


def _bounds(name: str, window: int) -> tuple[int | None, int | None]:
    """How many keys before and after its own a row attends, to a function of `_parts`."""
    if name == "sliding_window_bidirectional_overlay":
        return window, window
    if name == "sliding_window_overlay":
        return window - 1, None
    return None, 0 if name == "causal_mask_function" else None


def _parts(mask: Callable[..., Any]) -> Iterator[tuple[str, int]]:
    """The names of the functions that a mask is the intersection of, and the window of those that have one."""
    name, closed = mask.__qualname__.partition(".")[0], inspect.getclosurevars(mask).nonlocals
    if mask.__module__ != masks.__name__:
        name = f"{mask.__module__}.{name}"
    if name == "and_masks":
        for part in closed["mask_functions"]:
            yield from _parts(part)
    elif name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        yield name, int(closed["sliding_window"])
    elif name in ("causal_mask_function", "bidirectional_mask_function"):
        yield name, 0
    else:
        raise ProblemError(
            f"this model's mask has {name}, which is no band of keys, and attention is too large for a dense mask: expected "
            'causal or bidirectional attention, with or without a window; use attn_implementation="sdpa", or give more '
            "device_memory"
        )


def spans_of(padding: torch.Tensor | None, batch: int, keys: int, first: int) -> list[Span]:
    """The span of each batch entry, in the `keys` from key `first` on, of a mask [B, seen] that is True where no padding is.

    Raises ProblemError for padding between other tokens.
    """
    if padding is None:
        return [(0, keys)] * batch
    there = padding[:, first : first + keys].bool()
    counts = there.sum(1).tolist()
    starts = there.int().argmax(1).tolist() if there.shape[1] else counts
    for entry, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if not bool(there[entry, start : start + count].all()):
            raise ProblemError(
                f"attention_mask has padding between other tokens of batch entry {entry}: expected it at the ends alone; "
                "move it there"
            )
    return [(start, start + count) for start, count in zip(starts, counts, strict=True)]
