"""oocattn in Hugging Face transformers: an attention implementation, and a recorder of what attention layers get.

`register()` makes `attn_implementation="oocattn"` known. What fits the device budget goes to the library's own `sdpa`, and
other calls are streamed. Where the library would make a dense mask, it gets a description of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from oocattn.arguments import Size
from oocattn.errors import ProblemError
from oocattn.integrations.asked import BEYOND
from oocattn.integrations.capturing import Capture, capture
from oocattn.integrations.composition import Band, Span
from oocattn.integrations.described import DescribedMask
from oocattn.nn.alignment import align
from oocattn.nn.fitting import SMALL_BYTES, fits
from oocattn.nn.streaming import Budgets, stream
from oocattn.problem.given import GivenArrays
from oocattn.problem.options import ProblemOptions
from oocattn.problem_arguments import kept_array

__all__ = ["Capture", "capture", "register"]

NAME = "oocattn"


def register(
    *, device_memory: Size | None = None, host_memory: Size | None = None, scratch: str | Path | None = None
) -> None:
    """Make `attn_implementation="oocattn"` known to transformers, with these budgets; a second call changes them.

    They are those of `oocattn.nn.scaled_dot_product_attention`; a relative `scratch` is one of the current folder at this
    call. Raises ProblemError for one that is not understood.
    """
    AttentionInterface.register(NAME, partial(_attend, Budgets.parse(device_memory, host_memory, scratch)))
    AttentionMaskInterface.register(NAME, DescribedMask.of)


def _attend(
    budgets: Budgets,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DescribedMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer: q [B, Hq, Nq, D] over k, v [B, Hkv, Nk, D], as [B, Nq, Hq, Dv]. `s_aux` are learnable sinks."""
    if dropout:
        raise ProblemError(f"dropout = {dropout}: there is no dropout; call model.eval(), or set attention_dropout=0.0")
    mask = _mask_of(module, query, key, is_causal) if attention_mask is None else attention_mask
    if softcap is None and s_aux is None and _is_small(query, key, value, mask, budgets.device_memory):
        causal = mask.plain if isinstance(mask, DescribedMask) else None
        dense = (mask.dense if isinstance(mask, DescribedMask) else mask) if causal is None else None
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, dense, scaling=scaling, is_causal=bool(causal), **others
        )
        return found
    _refuse_beyond(mask, others)
    terms = {"scale": scaling, "softcap": softcap or None, "given": _sinks(s_aux)}
    return _stream_entries(query, key, value, mask, terms, budgets).transpose(1, 2).contiguous(), None


def _refuse_beyond(mask: DescribedMask | torch.Tensor, others: Mapping[str, Any]) -> None:
    """Raise ProblemError for what streamed attention does not have, by the name of the argument that asks for it."""
    remedy = 'use attn_implementation="sdpa", or give more device_memory'
    if others.get("position_bias") is not None or not isinstance(mask, DescribedMask):
        name = "attention_mask" if others.get("position_bias") is None else "position_bias"
        raise ProblemError(
            f"{name}: a dense mask or bias is not supported where attention is streamed: expected an attention_mask [B, N] "
            f"of padding at the ends; {remedy}"
        )
    for name in (*BEYOND, "cu_seq_lens_q", "head_mask"):
        if others.get(name) is not None:
            raise ProblemError(f"{name}: this argument of the model is not supported where attention is streamed; {remedy}")


def _sinks(given: torch.Tensor | None) -> GivenArrays:
    """The learnable sinks of a layer, as our own argument takes them."""
    if given is None:
        return GivenArrays()
    sinks = given.detach().float().numpy(force=True)
    return GivenArrays(
        learnable_sink=kept_array("learnable_sink", sinks, lambda why: ProblemError(f"s_aux: expected {why}"))
    )


def _mask_of(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None) -> DescribedMask:
    """The mask of a layer that got none, as `sdpa` understands it: causal is top-left, and a single query attends all."""
    queries, keys = query.shape[2], key.shape[2]
    causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return DescribedMask.of(
        len(query), queries, keys, mask_function=causal_mask_function if causal else bidirectional_mask_function
    )


def _is_small(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: DescribedMask | torch.Tensor,
    device_memory: int | None,
) -> bool:
    """Whether `sdpa` has room for a call and its mask, which it has in the dtype of the query, too."""
    causal = mask.plain if isinstance(mask, DescribedMask) else None
    if causal is not None:
        return fits(query, key, value, causal, device_memory)
    elements = mask.elements if isinstance(mask, DescribedMask) else mask.numel()
    left = (SMALL_BYTES if device_memory is None else device_memory) - elements * (1 + query.element_size())
    return left > 0 and fits(query, key, value, False, None if device_memory is None else left)


@torch.compiler.disable  # type: ignore[untyped-decorator] # generate compiles passes of a static cache on a GPU
def _stream_entries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: DescribedMask,
    terms: dict[str, Any],
    budgets: Budgets,
) -> torch.Tensor:
    """Stream a call: all batch entries together, or, where their padding differs, one after the other."""
    band, spans = mask.band, mask.spans
    together = len(set(spans)) == 1
    entries = [slice(None)] if together else [slice(entry, entry + 1) for entry in range(len(spans))]
    found = [
        _stream_span(query[entry], key[entry], value[entry], band, span, terms, budgets)
        for entry, span in zip(entries, spans, strict=False)
    ]
    return found[0] if together else torch.cat(found)


def _stream_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    span: Span,
    terms: dict[str, Any],
    budgets: Budgets,
) -> torch.Tensor:
    """Stream attention to a span of the keys. Rows that attend none are 0."""
    first, last = span
    rows, keys = query.shape[2], last - first
    mask: dict[str, Any] = {}
    if band.left is not None or band.right is not None:
        right = rows + last if band.right is None else band.right
        aligned = align(rows, keys, band.offset - first, band.left, right)
        rows, keys = aligned.rows, aligned.keys
        mask = {"causal": aligned.causal, "window_size": aligned.window_size}
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    if rows and keys:
        k, v = (tensor[:, :, first : first + keys] for tensor in (key, value))
        found = stream(query[:, :, :rows], k, v, ProblemOptions(**mask, **terms), budgets)
        if rows == query.shape[2]:
            return found
        out[:, :, :rows] = found
    return out
