"""What a model asks of an attention function, as arguments of ours: its scale, softcap and sinks, and its mask.

A mask is recorded where it is a band of keys around the last query at the last key. The call names its window, and whether
it is causal; what it hands over as its mask decides whether that is so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from oocattn import arguments
from oocattn.integrations.composition import Band
from oocattn.integrations.described import DescribedMask
from oocattn.problem.options import Window
from oocattn.problem.recorded import RecordedCall

BEYOND = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of a call that make it another function than any we have."""

_BLOCK = 1 << 24  # elements of a dense mask that are compared at a time


def asked_of(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: int,
    mask: object,
    options: dict[str, Any],
    before: RecordedCall | None = None,
) -> RecordedCall:
    """What a call asks, of queries [B, Hq, Nq, D] over so many `keys`, after calls that asked what is in `before`.

    Raises ProblemError for a scale or softcap that we do not have.
    """
    scale, softcap = options.get("scaling"), options.get("softcap")
    found = _window_of(implementation, module, query.shape[2], keys, mask, options, before)
    left, right = (None, None) if found is None else found
    return RecordedCall(
        scale=None if scale is None else arguments.scale("scale", scale),
        softcap=arguments.scale("softcap", softcap) if softcap else None,
        causal=None if found is None else right == 0,
        window_size=(left, None if right == 0 else right),
        learnable_sink=options.get("s_aux") is not None,
    )


def _window_of(
    implementation: str,
    module: torch.nn.Module,
    rows: int,
    keys: int,
    mask: object,
    options: dict[str, Any],
    before: RecordedCall | None,
) -> Window | None:
    """How many keys before and after its own each row attends; None where the mask is no such band."""
    if any(options.get(name) is not None for name in BEYOND) or (before is not None and before.causal is None):
        return None
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    width = options.get("sliding_window")
    actual: Band | torch.Tensor | None
    if "flash" in implementation:
        actual = _flash_band(rows, keys, causal, width, mask, options)
    elif mask is None:
        actual = Band(0, None, 0 if causal and rows > 1 and implementation != "eager" else None)
    elif isinstance(mask, DescribedMask):
        whole = mask.is_band and all(first == 0 and last >= keys for first, last in mask.spans)
        actual = mask.band if whole else None
    else:
        actual = mask if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None
    candidates = _named_windows(causal, width) if before is None else [(before.window_size[0], _right(before))]
    if actual is None:
        return None
    return next((each for each in candidates if _is_same(actual, rows, keys, *each)), None)


def _right(call: RecordedCall) -> int | None:
    return 0 if call.causal else call.window_size[1]


def _named_windows(causal: bool, width: int | None) -> Iterator[Window]:
    """The windows that a call may mean. Both-sided ones are counted with the row's own key, or without."""
    one_sided: list[Window] = [*([] if width is None else [(width - 1, 0)]), (None, 0)]
    both_sided: list[Window] = [*([] if width is None else [(width - 1, width - 1), (width, width)]), (None, None)]
    yield from (*one_sided, *both_sided) if causal else (*both_sided, *one_sided)


def _flash_band(rows: int, keys: int, causal: bool, width: int | None, mask: object, options: dict[str, Any]) -> Band | None:
    """The band of a call of FlashAttention, whose last query is at the last key."""
    padded = isinstance(mask, torch.Tensor) and not bool(mask.all())
    if padded or options.get("cu_seq_lens_q") is not None:
        return None
    beside = None if width is None else width - 1
    return Band(keys - rows, beside, 0 if causal else beside)


def _is_same(actual: Band | torch.Tensor, rows: int, keys: int, left: int | None, right: int | None) -> bool:
    """Whether a mask has each row attend the keys from `left` before to `right` after its own, of these `keys`."""
    step = max(1, _BLOCK // max(1, keys if isinstance(actual, Band) else actual[:, :, :1].numel()))
    first, last = _bounds(Band(keys - rows, left, right), rows, keys)
    if isinstance(actual, Band):
        other_first, other_last = _bounds(actual, rows, keys)
        return bool(((first == other_first) & (last == other_last)).all())
    if actual.shape[2] not in (1, rows) or actual.shape[3] < keys:
        return False
    columns = torch.arange(actual.shape[3], device=actual.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block = actual[:, :, part if actual.shape[2] == rows else slice(None)]
        there = block if block.dtype == torch.bool else block == 0
        if block.dtype != torch.bool and not bool((there | (block <= torch.finfo(block.dtype).min / 2)).all()):
            return False  # a bias
        begin, end = (bound[part, None].to(actual.device) for bound in (first, last))
        if not bool((there == ((columns >= begin) & (columns < end))).all()):
            return False
    return True


def _bounds(band: Band, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key that each row attends, and the one after the last; both are 0 where it attends none."""
    at = torch.arange(rows) + band.offset
    first = torch.zeros_like(at) if band.left is None else (at - band.left).clamp(min=0)
    last = torch.full_like(at, keys) if band.right is None else (at + band.right + 1).clamp(max=keys)
    empty = first >= last
    return first.masked_fill(empty, 0), last.masked_fill(empty, 0)
