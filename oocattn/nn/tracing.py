"""Tensors that only stand for others: what traces, compiles or transforms a program cannot look into a streamed call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from oocattn.errors import ProblemError

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Have `torch.compile` call a function as it is.

    The compiler, whose import takes a second, is imported only where it is used.
    """

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        plain: Callable[P, R] = torch.compiler.disable(function)
        return plain(*arguments, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def refuse_traced(*tensors: torch.Tensor) -> None:
    """Raise ProblemError for tensors that stand for others."""
    remedy = "call it outside, or give as much device_memory as torch's own call needs"
    if torch._C._is_tracing() or torch.compiler.is_exporting() or any(map(_is_fake, tensors)):
        raise ProblemError(
            f"query, key or value stands for a tensor of a program that is traced or exported, and has no numbers: {remedy}"
        )
    if any(map(_is_transformed, tensors)):
        raise ProblemError(
            "query, key or value is within a transform of torch.func or has a tangent, and attention that is streamed has "
            f"neither derivatives nor a batching rule: {remedy}"
        )


def _is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor) is not torch.Tensor and hasattr(tensor, "fake_mode")


def _is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is that of torch.func's vmap, grad or jvp, or has a tangent of forward mode."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None)
