"""torch's attention call, for tensors of any size."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional

from oocattn import arguments
from oocattn.arguments import Size
from oocattn.errors import ProblemError
from oocattn.nn.alignment import align
from oocattn.nn.fitting import fits
from oocattn.nn.streaming import Budgets, stream
from oocattn.nn.tracing import not_compiled, refuse_traced
from oocattn.problem.options import ProblemOptions


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    scratch: str | Path | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of query [..., Hq, Nq, D], key and value [..., Hkv, Nk, D or Dv].

    The tensors are in host memory or on a GPU, and the result [..., Hq, Nq, Dv] is of the query's dtype and device. Where
    inputs and output fit `device_memory`, in bytes or like "1GiB", this is torch's own call (default: half of what is free
    where the tensors lie; for tensors in host memory beside a GPU, 64 MiB). Else they are streamed through the GPUs within
    `device_memory`, or through the CPU. `host_memory` bounds what that allocates besides the result (default: half of what
    is free). What has no room there lies in a folder in `scratch` (default: that of temporary files) while it is needed; a
    result that is larger than `host_memory` is a map of a file.

    Arguments mean what they mean to torch. `is_causal` is top-left at every size: query i attends the keys up to i. (The
    `causal` of `oocattn.attention` is bottom-right.) There is no `attn_mask` and no dropout. Gradients are torch's own;
    where tensors are streamed there are none.

    Raises ProblemError for what cannot be computed, BudgetError with the smallest budget that works, and what
    `oocattn.attention` raises.
    """
    _refuse(query, key, value, attn_mask, dropout_p)
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise arguments.refused(name, flag, "True or False")
    budgets = Budgets.parse(device_memory, host_memory, scratch)
    if fits(query, key, value, is_causal, budgets.device_memory):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _streamed(query, key, value, is_causal, scale, enable_gqa, budgets)


@not_compiled
def _streamed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    budgets: Budgets,
) -> torch.Tensor:
    refuse_traced(query, key, value)
    q, k, v = _four_dimensional(query, key, value, enable_gqa)
    found = attend_top_left(q, k, v, is_causal, scale, budgets)
    heads = [found.shape[1]] if max(query.dim(), key.dim(), value.dim()) > 2 else []
    return found.reshape(*_batches(query, key, value), *heads, *found.shape[-2:])


def _refuse(query: object, key: object, value: object, attn_mask: object, dropout_p: float) -> None:
    """Raise ProblemError for arguments that are supported at no size."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise arguments.refused(name, tensor, "a tensor of PyTorch; oocattn.attention takes arrays of other kinds")
    if attn_mask is not None:
        raise ProblemError(
            "attn_mask: a dense mask has as many elements as there are scores, and is not supported at any size: use "
            "is_causal, or oocattn.attention, whose arguments name windows, documents, padding and biases "
            "(help(oocattn.ProblemArguments))"
        )
    if not (isinstance(dropout_p, int | float) and dropout_p == 0):
        raise arguments.refused("dropout_p", dropout_p, "0.0, for there is no dropout (in training, use torch's own call)")


def attend_top_left(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float | None, budgets: Budgets
) -> torch.Tensor:
    """Stream the attention of tensors [B, H, N, D]; causal: query i attends the keys up to i."""
    checked = None if scale is None else arguments.scale("scale", scale)
    if not is_causal:
        return stream(q, k, v, ProblemOptions(scale=checked), budgets)
    found = align(q.shape[2], k.shape[2])
    options = ProblemOptions(causal=found.causal, window_size=found.window_size, scale=checked)
    return stream(q, k[:, :, : found.keys], v[:, :, : found.keys], options, budgets)


def _batches(*tensors: torch.Tensor) -> tuple[int, ...]:
    """The dimensions before heads, broadcast. Raises ProblemError where they do not go together."""
    try:
        return tuple(torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors)))
    except RuntimeError:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ProblemError(f"query, key and value {shapes} have other batches: expected the same before heads") from None


def _four_dimensional(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors as [B, H, N, D]. Only batches that neither are views of memory nor can be are copied.

    Raises ProblemError for heads that do not go together.
    """
    heads, key_heads, value_heads = (tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key, value))
    kv_heads = max(key_heads, value_heads)
    if not {key_heads, value_heads} <= {1, kv_heads}:
        raise ProblemError(
            f"key {list(key.shape)} has {key_heads} heads and value {list(value.shape)} has {value_heads}: expected as "
            "many, or 1 of either"
        )
    if heads % kv_heads if enable_gqa else heads != kv_heads and 1 not in (heads, kv_heads):
        raise ProblemError(
            f"query {list(query.shape)} has {heads} heads and key {list(key.shape)} has {key_heads}: expected as many, or "
            "with enable_gqa=True a multiple"
        )
    batches = _batches(query, key, value)

    def arrange(tensor: torch.Tensor, count: int) -> torch.Tensor:
        rows = tensor.shape[-2:]
        return tensor.expand(*batches, count, *rows).reshape(math.prod(batches), count, *rows)

    return arrange(query, max(heads, kv_heads)), arrange(key, kv_heads), arrange(value, kv_heads)
