"""Whether torch's own call has room for a problem: bytes of its tensors against a budget. It takes microseconds."""

from __future__ import annotations

import math

import torch

from oocattn.planning.host import default_host_memory

SMALL_BYTES = 64 << 20
"""Bytes of a problem that torch's own call gets without a look at what is free."""


def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, device_memory: int | None) -> bool:
    """Whether torch's call over these tensors, q [..., Nq, D], k [..., Nk, D] and v [..., Nk, Dv], stays within a budget.

    Inputs and output count, and the scores where torch would store them. By default the budget is half of what is free
    where the tensors lie; but tensors in host memory are small only up to `SMALL_BYTES` where a GPU could compute them.
    """
    if not all(map(_has_numbers, (query, key, value))):
        return True  # torch has an answer, or a refusal
    keys, head_dim = key.shape[-2:]
    rows = max(query.numel() // query.shape[-1], key.numel() // (keys * head_dim) * query.shape[-2])
    operands = query.numel() + key.numel() + value.numel()
    least = (operands + rows * value.shape[-1]) * query.element_size()
    stored = least + 2 * rows * keys * max(query.element_size(), 4)  # scores and weights
    if device_memory is None and stored <= SMALL_BYTES:
        return True
    limit = _default_limit(query, operands) if device_memory is None else device_memory
    return stored <= limit or (least <= limit and not _stores_scores(query, key, value, causal))


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether it is a dense tensor with rows of numbers: no nested, sparse, meta or empty one."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
        and tensor.dim() > 1
        and bool(tensor.numel())
    )


def _default_limit(query: torch.Tensor, operands: int) -> int:
    """Bytes of a problem at most where no budget is given."""
    if query.device.type == "cuda":
        return operands * query.element_size() + int(torch.cuda.mem_get_info(query.device)[0]) // 2
    return SMALL_BYTES if torch.cuda.is_available() else default_host_memory()


def _stores_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> bool:
    """Whether torch would compute the scores as a whole: its choice for what its fused kernels do not take."""
    grouped = query.dim() > 2 and math.prod(query.shape[:-2]) != math.prod(key.shape[:-2])
    try:
        return bool(torch._fused_sdp_choice(query, key, value, None, 0.0, causal, enable_gqa=grouped) == 0)
    except RuntimeError:  # shapes that do not go together
        return True
