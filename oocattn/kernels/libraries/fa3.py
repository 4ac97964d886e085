"""The FlashAttention-3 kernel, for Hopper GPUs with that library; no dependency.

Shah et al., arXiv 2407.08608. Its official build is the module `flash_attn_interface`, a forward-only one
`fa3_fwd_interface`. Builds differ in the dtypes and head dimensions that they were compiled for: a trial call tells.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from oocattn.kernels.cuda.device import hopper_reason
from oocattn.kernels.kernel import HALF_DTYPES, unsupported_dtype
from oocattn.kernels.libraries.library import LibraryKernel

_MODULES = ("flash_attn_interface", "fa3_fwd_interface")


class Fa3Kernel(LibraryKernel):
    """FlashAttention-3; causal calls are square. The first question about support makes a tiny call."""

    name = "fa3"

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        reason = hopper_reason(device) or unsupported_dtype(dtype, HALF_DTYPES)
        if reason:
            return reason
        if library_call() is None:
            return f"neither {' nor '.join(_MODULES)} is installed"
        return self._refusal(device, dtype, head_dim, value_dim)

    @staticmethod
    @cache
    def _refusal(device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        """The refusal of a tiny call, in the library's words; "" if there is none."""
        key, value = (torch.zeros(64, dim, dtype=getattr(torch, dtype), device=device) for dim in (head_dim, value_dim))
        try:
            Fa3Kernel()._call(key.unsqueeze(0), key, value, 1.0, False)
        except Exception as error:
            return f"the library refuses it: {str(error).strip().partition(chr(10))[0]}"
        return ""

    def _call(self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        attend = library_call()
        assert attend is not None, "`unsupported_reason` was not asked"
        out, lse, *_ = attend(
            query.transpose(0, 1).unsqueeze(0),  # [1, n, g, D]
            key[None, :, None],  # [1, m, 1, D]
            value[None, :, None],
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,  # without it, newer versions return no log-sum-exp
        )
        return out[0].transpose(0, 1), lse[0]


@cache
def library_call(name: str = "flash_attn_func") -> Callable[..., Any] | None:
    """The library's function of that name, if a build that has it is installed and loads."""
    for module in _MODULES:
        with suppress(ImportError, OSError, AttributeError):
            found: Callable[..., Any] = getattr(import_module(module), name)
            return found
    return None
